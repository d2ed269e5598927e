"""Consistency distillation: one step of the teacher makes no difference to where f leads.

Song et al. 2023, "Consistency models", Algorithm 2. With an exact f the loss of a solver of order p
vanishes as (t - s)^(2 p + 2), not at once: the teacher's step is not exact.
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.process import over_dimensions
from ldm_core.distillation.trajectory import Slope, heun_slope
from ldm_core.objectives.regression import Distance, pseudo_huber


def consistency_distillation_loss(
    student: Network,
    averaged: Network,
    teacher_velocity: Network,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Condition,
    slope: Slope = heun_slope,
    distance: Distance = pseudo_huber,
) -> Tensor:
    """d(f(x_t, t), sg f(x_s, s)) with x_s one teacher step from x_t (Song et al. 2023, Eq. 7).

    Args:
        student: f, trained: (x_t, t, cond) -> x0, the data itself at t = 0.
        averaged: f that sets the aim; its EMA, or the student again.
        teacher_velocity: v(x_t, t, cond), guided as the student shall be.
        x_t: (B, ...) noisy latents.
        t: (B,).
        s: (B,), below t.
        cond: B conditions.
        slope: of the teacher's step, `euler_slope` or `heun_slope`.
        distance: between two estimates of x0; its gradients reach the student only.

    Returns:
        (B,).
    """
    with torch.no_grad():
        x_s = x_t - over_dimensions(t - s, x_t) * slope(teacher_velocity, x_t, t, s, cond)
        aim = averaged(x_s, s, cond)
    return distance(student(x_t, t, cond), aim)
