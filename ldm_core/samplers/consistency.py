"""Sampling from a consistency model: to the data in one evaluation, then noise to the next time."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.process import add_noise
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Noise


def sample_consistency(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
) -> Tensor:
    """x_r = alpha_r f(x_t, t) + sigma_r z (Song et al. 2023, Algorithm 1; Luo et al. 2023,
    Algorithm 3). From an exact f the data has its distribution after any number of steps.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        denoiser: its `denoise` is the consistency function f, the end of the ODE from x_t.
        noise: draw k is for step k.
    """
    check_grid(grid, denoiser.process)
    x = x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x = add_noise(denoiser.process, x0, noise(index).to(x.dtype), r.double())
    return x
