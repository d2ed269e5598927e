"""DDIM: the probability-flow ODE with the data estimate held over a step, order 1."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.exponential import ddim_step


def sample_ddim(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
) -> Tensor:
    """x_r = alpha_r x0 + sigma_r eps (Song et al. 2021, Eq. 12 with sigma = 0), which is also
    DPM-Solver++(1S) (Lu et al. 2022b) and, on a flow or VE, `sample_euler`; n steps cost n
    evaluations.

    Args:
        denoiser: gives x0.
        x_T: (B, ...) state at grid[0].
        grid: (steps + 1,) decreasing times, as from `linear_grid`.
        cond: B conditions.
        on_step: called before each step; may raise to stop.

    Returns:
        (B, ...) state at grid[-1]. Gradients flow; call under `torch.no_grad` to sample only.

    Raises:
        ValueError: the grid does not run from noise to data within the process.
    """
    check_grid(grid, denoiser.process)
    x = x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x = ddim_step(denoiser.process, x, x0, t, r)
    return x
