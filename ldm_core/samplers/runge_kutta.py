"""The classical Runge-Kutta method on the probability-flow ODE: order 4, four evaluations a step.

For reference trajectories; samplers that know the ODE's linear part do better at few steps.
"""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.samplers.events import OnStep, StepEvent


def sample_rk4(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
) -> Tensor:
    """x_r = x_t - (t - r) (v_1 + 2 v_2 + 2 v_3 + v_4) / 6 (Kutta 1901); a step to r = 0 is
    Euler's, as in `sample_heun`.

    Arguments, result and errors as in `sample_ddim`; n steps down to 0 cost 4n - 3 evaluations.
    """
    process, x = denoiser.process, x_T
    check_grid(grid, process)
    for index, (t, r) in enumerate(pairwise(grid)):
        v = denoiser.velocity(x, t, cond)
        x0 = convert(v, x, t, process, Prediction.VELOCITY, Prediction.X0)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        if r == 0:
            return x0
        h, s = t - r, (t + r) / 2
        v_2 = denoiser.velocity(x - h / 2 * v, s, cond)
        v_3 = denoiser.velocity(x - h / 2 * v_2, s, cond)
        v_4 = denoiser.velocity(x - h * v_3, r, cond)
        x = x - h * (v + 2 * v_2 + 2 * v_3 + v_4) / 6
    return x
