"""Self-consistency of a flow map: one leap lands where two of its halves do.

Shortcut models (Frans et al. 2025, Eq. 4) for average velocities; the semigroup property
Phi_{t->r} = Phi_{s->r} o Phi_{t->s} of flow maps (Boffi et al. 2025).
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition
from ldm_core.diffusion.flow_map import AverageVelocity
from ldm_core.diffusion.process import over_dimensions
from ldm_core.objectives.regression import mean_square


def shortcut_loss(
    student: AverageVelocity,
    averaged: AverageVelocity,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Condition,
) -> Tensor:
    """||u(x_t, t, r) - mean of the two halves' velocities||^2, (B,).

    Args:
        student: trained.
        averaged: its EMA, which makes the target, without gradients.
        x_t: (B, ...) at `t`.
        t: (B,).
        r: (B,), at most t.
        cond: B conditions.
    """
    return mean_square(student(x_t, t, r, cond), two_halves(averaged, x_t, t, r, cond))


@torch.no_grad()
def two_halves(u: AverageVelocity, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
    """Average velocity over [r, t] by way of the middle s: (u(x_t, t, s) + u(x_s, s, r)) / 2."""
    s = (t + r) / 2
    first = u(x_t, t, s, cond)
    x_s = x_t - over_dimensions(t - s, x_t) * first
    return (first + u(x_s, s, r, cond)) / 2
