"""Distribution matching distillation: follow the gradient of KL(student || teacher), noised.

Yin et al. 2024, "One-step diffusion with distribution matching distillation", Eq. 7-8, after
DreamFusion and VSD. The scores of the two noised distributions are those of two denoisers, the
teacher and a fake one that is trained on what the student generates (`denoising_loss`). Their
difference is a difference of estimates, s_F - s_T = alpha / sigma^2 (D_F - D_T), so

    d KL / d theta = E[SNR_t (D_F - D_T)(x_t) . dG / dtheta],   x_t = alpha G + sigma eps
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.process import Process, add_noise, half_log_snr, over_dimensions
from ldm_core.objectives.regression import mean_square
from ldm_core.objectives.weightings import snr

MatchingWeight = Callable[[Process, Tensor, Tensor, Tensor], Tensor]
"""(process, generated (B, ...), the teacher's estimate of it (B, ...), t (B,)) -> (B,)."""


def kl_weight(process: Process, generated: Tensor, estimate: Tensor, t: Tensor) -> Tensor:
    """SNR_t: the gradient of the KL divergence at t exactly."""
    return snr(half_log_snr(process, t))


def normalising_weight(process: Process, generated: Tensor, estimate: Tensor, t: Tensor) -> Tensor:
    """1 / mean |G - D_T|: gradients of one size at all times, as DMD and DMD2 have it."""
    return 1 / (generated - estimate).abs().flatten(1).mean(dim=1)


@torch.no_grad()
def matching_gradient(
    generated: Tensor,
    teacher: DenoiserLike,
    fake: DenoiserLike,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    weight: MatchingWeight = normalising_weight,
) -> Tensor:
    """w (D_F - D_T)(x_t), what generated samples are to move against: (B, ...) -> (B, ...).

    Args:
        generated: (B, ...) G(z), the student's samples.
        teacher: guided as the student shall be.
        fake: denoises the student's samples; not guided.
        eps: (B, ...) standard normal noise.
        t: (B,), away from 0 and the end, e.g. in [0.02, 0.98].
        cond: B conditions.
        weight: w.
    """
    x_t = add_noise(teacher.process, generated, eps, t)
    estimate = teacher.denoise(x_t, t, cond)
    difference = fake.denoise(x_t, t, cond) - estimate
    return over_dimensions(weight(teacher.process, generated, estimate, t), generated) * difference


def distribution_matching_loss(generated: Tensor, gradient: Tensor) -> Tensor:
    """||G - sg[G - gradient]||^2 / 2: (B,), whose gradient by G is `gradient` over its size."""
    return mean_square(generated, (generated - gradient).detach()) / 2
