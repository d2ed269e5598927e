"""Euler's method on the probability-flow ODE: order 1, one evaluation per step."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.samplers.events import OnStep, StepEvent


def sample_euler(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
) -> Tensor:
    """x_r = x_t - (t - r) v(x_t, t); on a flow this is DDIM (Song et al. 2021, Eq. 13).

    A step to t = 0 ends at the estimate of the data, which on a flow is the same. Where sigma goes
    as sqrt(t), as in VP, v is infinite at 0, and a step along it would leave half the noise.

    Args:
        denoiser: gives the velocity.
        x_T: (B, ...) state at grid[0].
        grid: (steps + 1,) decreasing times, as from `linear_grid`.
        cond: B conditions.
        on_step: called before each step.

    Returns:
        (B, ...) state at grid[-1]. Gradients flow; call under `torch.no_grad` to sample only.

    Raises:
        ValueError: as `check_grid`.
    """
    process, x = denoiser.process, x_T
    check_grid(grid, process)
    for index, (t, r) in enumerate(pairwise(grid)):
        v = denoiser.velocity(x, t, cond)
        x0 = convert(v, x, t, process, Prediction.VELOCITY, Prediction.X0)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x = x - (t - r) * v if r > 0 else x0
    return x
