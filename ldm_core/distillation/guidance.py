"""Guidance distillation: one conditional pass that does the work of two.

Meng et al. 2023, "On distillation of guided diffusion models", Eq. 2, for one fixed scale.
"""

import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import DenoiserLike, Network
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.objectives.regression import mean_square


@torch.no_grad()
def guided_velocity(
    teacher: DenoiserLike,
    x_t: Tensor,
    t: Tensor | float,
    cond: TextCondition,
    null: TextCondition,
    scale: float | Tensor,
) -> Tensor:
    """v_u + w (v_c - v_u), without gradients: (B, ...) -> (B, ...)."""
    return ClassifierFreeGuidance(teacher, scale, null).velocity(x_t, t, cond)


def guidance_distillation_loss(
    student_velocity: Network,
    teacher: DenoiserLike,
    x_t: Tensor,
    t: Tensor,
    cond: TextCondition,
    null: TextCondition,
    scale: float | Tensor,
) -> Tensor:
    """||v_S(x_t, t, c) - [v_u + w (v_c - v_u)]||^2.

    Args:
        student_velocity: the network trained, or its `Denoiser.velocity`.
        teacher: trained with captions dropped; not guided.
        x_t: (B, ...) noisy latents.
        t: (B,).
        cond: B captions.
        null: the empty caption, a batch of 1 or B.
        scale: w, one number or (B,).

    Returns:
        (B,), zero exactly where the student is the guided teacher.
    """
    target = guided_velocity(teacher, x_t, t, cond, null, scale)
    return mean_square(student_velocity(x_t, t, cond), target)
