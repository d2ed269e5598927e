"""Sampling from a consistency model: to the data in one evaluation, then noise to the next time."""

from itertools import pairwise

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Noise
from ldm_core.samplers.transition import transition


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

    Args:
        denoiser: its `denoise` is the consistency function f, the end of the ODE from x_t.
        x_T: (B, ...) state at grid[0].
        grid: (steps + 1,) decreasing times.
        cond: B conditions.
        on_step: called before each step.
        noise: draw k is for step k.

    Returns:
        (B, ...) state at grid[-1]. Gradients flow; call under `torch.no_grad` to sample only.

    Raises:
        ValueError: the grid does not run from noise to data within the process.
    """
    check_grid(grid, denoiser.process)
    x, none = x_T, torch.zeros((), dtype=torch.float64)
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x = transition(denoiser.process, x, x0, t, r, none, noise(index))
    return x
