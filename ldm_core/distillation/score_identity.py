"""Score identity distillation: the Fisher divergence of student and teacher, noised.

Zhou et al. 2024, "Score identity distillation" (SiD). E||D_T - D_F||^2 is estimated in two ways,
by its definition and, as E[D_F - G | x_t] = 0 for the fake denoiser of the student's samples G, by

    E[(D_T - D_F) . (D_T - G)]

of which the second less k times the first is descended. Unlike in distribution matching the
gradient passes through both denoisers.
"""

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.process import add_noise
from ldm_core.distillation.distribution_matching import MatchingWeight, normalising_weight


def score_identity_loss(
    generated: Tensor,
    teacher: DenoiserLike,
    fake: DenoiserLike,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    k: float = 1.0,
    weight: MatchingWeight = normalising_weight,
) -> Tensor:
    """w [(1 - k) ||D_T - D_F||^2 + (D_T - D_F) . (D_F - G)].

    Args:
        generated: (B, ...) G(z), the student's samples, with gradients.
        teacher: guided as the student shall be; its weights and the fake's are to be frozen here.
        fake: denoises the student's samples.
        eps: (B, ...) standard normal noise.
        t: (B,), away from 0 and the end.
        cond: B conditions.
        k: 1 to 1.2; above, training diverges.
        weight: w, without gradients.

    Returns:
        (B,) mean over a sample's dimensions. With the best fake denoiser and a w of t alone, it is
        (1 - k) w E||D_T - D_F||^2 in expectation, so its value says nothing at k = 1.
    """
    x_t = add_noise(teacher.process, generated, eps, t)
    real, imitated = teacher.denoise(x_t, t, cond), fake.denoise(x_t, t, cond)
    apart = real - imitated
    loss = (1 - k) * apart.square() + apart * (imitated - generated)
    return weight(teacher.process, generated, real, t).detach() * loss.flatten(1).mean(dim=1)
