"""Heun's method on the probability-flow ODE: order 2, two evaluations per step."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.samplers.events import OnStep, StepEvent


def sample_heun(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler to r, then again with the mean of the velocities at both ends (Karras et al. 2022,
    Algorithm 1); a step to r = 0 is Euler's, as there, since v(x_0, 0) need not be defined.

    Arguments, result and errors as in `sample_euler`; n steps down to 0 cost 2n - 1 evaluations.
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
        v_r = denoiser.velocity(x - (t - r) * v, r, cond)
        x = x - (t - r) * (v + v_r) / 2
    return x
