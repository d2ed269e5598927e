"""Sampling from a flow map: any number of steps, exact for an exact map whatever the number."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition
from ldm_core.diffusion.flow_map import AverageVelocity
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.process import FlowProcess, Process
from ldm_core.samplers.events import OnStep, StepEvent

FLOW = FlowProcess()


def sample_flow_map(
    flow_map: AverageVelocity,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    process: Process = FLOW,
) -> Tensor:
    """x_r = x_t - (t - r) u(x_t, t, r, cond) (Geng et al. 2025, Eq. 12).

    Args:
        flow_map: gives the average velocity over [r, t].
        x_T: (B, ...) state at grid[0].
        grid: (steps + 1,) decreasing times; [1, 0] samples in one step.
        cond: B conditions.
        on_step: called before each step; its x0 runs the average velocity on to t = 0.
        process: the one it is a map of.

    Returns:
        (B, ...) state at grid[-1]. Gradients flow; call under `torch.no_grad` to sample only.

    Raises:
        ValueError: the grid does not run from noise to data within the process.
    """
    check_grid(grid, process)
    x = x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        u = flow_map(x, t, r, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x - t * u))
        x = x - (t - r) * u
    return x
