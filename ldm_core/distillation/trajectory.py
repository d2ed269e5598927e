"""Trajectory distillation: learn in one leap where the teacher gets in several steps.

The target of progressive distillation (Salimans & Ho 2022, Algorithm 2) for a leap between any
two times, as an average velocity: (x_t - x_r) / (t - r) after the teacher went from t to r. Being
the mean of the velocities used, it is computed without the division and holds at r = t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.flow_map import AverageVelocity
from ldm_core.diffusion.process import over_dimensions
from ldm_core.objectives.regression import mean_square

Slope = Callable[[Network, Tensor, Tensor, Tensor, Condition], Tensor]
"""(velocity, x_t, t, r, cond) -> the velocity a solver steps from t to r with, (B, ...)."""


def euler_slope(velocity: Network, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
    """v(x_t, t): order 1."""
    return velocity(x_t, t, cond)


def heun_slope(velocity: Network, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
    """The mean of v at t and at Euler's guess for r: order 2, for a velocity defined at t = 0."""
    v = velocity(x_t, t, cond)
    return (v + velocity(x_t - over_dimensions(t - r, x_t) * v, r, cond)) / 2


@torch.no_grad()
def average_teacher_velocity(
    teacher_velocity: Network,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Condition,
    substeps: int,
    slope: Slope = heun_slope,
) -> Tensor:
    """(x_t - x_r) / (t - r) after `substeps` equal steps; v(x_t, t) where r = t.

    Args:
        teacher_velocity: v(x_t, t, cond), guided as the student shall be.
        x_t: (B, ...).
        t: (B,), each sample's own.
        r: (B,), at most t.
        cond: B conditions.
        substeps: at least 1.
        slope: the solver, `euler_slope` or `heun_slope`.

    Returns:
        (B, ...) without gradients.
    """
    total, x = torch.zeros_like(x_t), x_t
    for index in range(substeps):
        start = torch.lerp(t, r, index / substeps)
        end = torch.lerp(t, r, (index + 1) / substeps)
        v = slope(teacher_velocity, x, start, end, cond)
        x = x - over_dimensions(start - end, x) * v
        total = total + v
    return total / substeps


def trajectory_loss(
    student: AverageVelocity,
    teacher_velocity: Network,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Condition,
    substeps: int,
    slope: Slope = heun_slope,
) -> Tensor:
    """||u(x_t, t, r) - (x_t - x_r) / (t - r)||^2 with x_r the teacher's: (B,)."""
    target = average_teacher_velocity(teacher_velocity, x_t, t, r, cond, substeps, slope)
    return mean_square(student(x_t, t, r, cond), target)
