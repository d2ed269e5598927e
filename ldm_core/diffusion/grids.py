"""Grids of times to sample on: (steps + 1,) decreasing, computed in float64.

All of them end where they are told to, the data (t = 0) by default.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ldm_core.diffusion.process import Process
from ldm_core.diffusion.timesteps import shift_timesteps
from ldm_core.diffusion.variance_preserving import DiscreteVP


def linear_grid(steps: int, shift: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Times from 1 down to 0, equally spaced before the shift (Esser et al. 2024, Eq. 23).

    Raises:
        ValueError: less than one step, or a shift that is not positive.
    """
    _check_steps(steps)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_timesteps(t, shift).to(dtype)


def log_snr_grid(
    process: Process, steps: int, first: float, last: float, to_data: bool = True
) -> Tensor:
    """Equally spaced in lambda = ln(alpha / sigma) (Lu et al. 2022, Sec. 3.4).

    Args:
        process: says which times these are.
        steps: of the solver, the one to the data included.
        first, last: lambda of the noisiest and of the cleanest time, first < last.
        to_data: whether t = 0 follows, the last step.

    Raises:
        ValueError: first is not below last, or less than one step.
    """
    _check_steps(steps)
    if first >= last:
        raise ValueError(f"lambda runs from noise to data: first {first:g} < last {last:g}, please")
    rows = steps if to_data else steps + 1
    grid = process.time_of(torch.linspace(first, last, rows, dtype=torch.float64))
    return torch.cat([grid, grid.new_zeros(1)]) if to_data else grid


def karras_grid(
    process: Process, steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0
) -> Tensor:
    """sigma / alpha to the power of 1 / rho equally spaced, then t = 0 (Karras et al. 2022, Eq. 5).

    Args:
        process: says which times these noise levels are.
        steps: of the solver, the one to the data included.
        low, high: noise levels as if the data kept its size.
        rho: the larger, the denser at little noise.

    Raises:
        ValueError: low is not below high, either is not positive, or less than one step.
    """
    _check_steps(steps)
    if not 0 < low < high:
        raise ValueError(f"noise levels are to be 0 < low < high, got {low:g} and {high:g}")
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64)
    grid = process.time_of(-rho * ramp.log())
    return torch.cat([grid, grid.new_zeros(1)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a grid has at least 1 step, got {steps}")


Spacing = Literal["trailing", "leading", "linspace"]


def table_grid(process: DiscreteVP, steps: int, spacing: Spacing = "trailing") -> Tensor:
    """Rows of a table of betas, then t = 0 (Lin et al. 2024, Table 2, whose last row is T).

    trailing: from the last row down in equal strides: what few steps and zero terminal SNR need.
    leading: from the first row up in equal strides, so the last row is never visited (DDPM, DDIM).
    linspace: both the first and the last row.

    Raises:
        ValueError: more steps than rows, or another spacing.
    """
    rows = process.steps
    if not 1 <= steps <= rows:
        raise ValueError(f"{steps} steps over a table of {rows} rows: take 1 to {rows}")
    match spacing:
        case "trailing":
            row = rows - 1 - (torch.arange(steps, dtype=torch.float64) * rows / steps).round()
        case "leading":
            row = (torch.arange(steps, dtype=torch.float64) * (rows // steps)).flip(0)
        case "linspace":
            row = torch.linspace(0, rows - 1, steps, dtype=torch.float64).round().flip(0)
        case _:
            raise ValueError(f"spacing is one of {', '.join(get_args(Spacing))}, got {spacing}")
    return torch.cat([process.time_of_step(row), row.new_zeros(1)])


def check_grid(grid: Tensor, process: Process) -> None:
    """Refuse a grid that does not run from noise to data within the process.

    Raises:
        ValueError: as `check_decreasing`, or outside [0, end].
    """
    check_decreasing(grid)
    if grid[-1] < 0 or grid[0] > process.end * (1 + 1e-6):
        raise ValueError(
            f"times lie in [0, {process.end:g}], this grid runs from {grid[0]:g} to {grid[-1]:g}"
        )


def check_decreasing(grid: Tensor) -> None:
    """Refuse a grid that does not run from noise to data.

    Raises:
        ValueError: fewer than two times, or not decreasing.
    """
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"a grid is (steps + 1,) times, at least 2, got shape {tuple(grid.shape)}")
    rises = (~(grid.diff() < 0)).nonzero()  # also what is no number
    if len(rises):
        i = int(rises[0])
        raise ValueError(
            f"a grid decreases from noise to data, but {grid[i]:g} is followed by {grid[i + 1]:g}"
        )
