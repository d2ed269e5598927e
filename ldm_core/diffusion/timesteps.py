"""Times to train at: uniform numbers in (0, 1) -> times, by inversion.

Randomness being an argument, every draw is a function of numbers a caller made, and what is
stratified before a draw is stratified after it. Times spread evenly are `u * process.end`.
"""

import math

import torch
from torch import Tensor

from ldm_core.diffusion.process import Process


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """logit t' = logit t + ln shift (Esser et al. 2024, Eq. 23, whose shift is sqrt(m / n)).

    A shift above 1 moves times towards noise. 0 and 1 stay where they are.

    Raises:
        ValueError: a shift that is not positive.
    """
    _check_shift(shift)
    return shift * t / (1 + (shift - 1) * t)


def stratified(u: Tensor) -> Tensor:
    """(B,) uniform numbers -> (B,), the i-th of them uniform in [i / B, (i + 1) / B].

    Each is uniform in (0, 1) over a random place in the batch, and a batch covers all times, which
    lowers the variance of its mean loss (cf. Kingma et al. 2021, Sec. I.1).
    """
    spread = (torch.arange(len(u), device=u.device) + u.double()) / len(u)
    return spread.to(u.dtype).clamp(max=1 - torch.finfo(u.dtype).eps / 2)  # 1 is not in (0, 1)


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """Uniform numbers in (0, 1) -> times with logit t ~ N(mean + ln shift, std^2).

    Esser et al. 2024, Eq. 19, by inversion, so stratified uniforms give stratified times.

    Raises:
        ValueError: a shift that is not positive.
    """
    _check_shift(shift)
    return torch.sigmoid(mean + math.log(shift) + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float = 1.29) -> Tensor:
    """1 - u - s (cos^2(pi u / 2) - 1 + u), heavy tails at both ends (Esser et al. 2024, Eq. 20).

    Args:
        u: uniform numbers in (0, 1).
        scale: s, above 0 for more times in the middle, below for more at the ends; 0 is uniform.

    Raises:
        ValueError: a scale at which this is no longer monotonic.
    """
    most = 2 / (math.pi - 2)
    if not -1 <= scale <= most:
        raise ValueError(f"the scale of mode times is to lie in [-1, {most:.4f}], got {scale:g}")
    return 1 - u - scale * ((u * math.pi / 2).cos().square() - 1 + u)


def log_normal(process: Process, u: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Times with ln(sigma_t / alpha_t) ~ N(mean, std^2) (Karras et al. 2022, Table 1).

    For a flow this is `logit_normal`; for TrigFlow, ln tan t ~ N(mean, std^2) (Lu & Song 2024,
    Algorithm 1). A process that ends before pure noise has the tail beyond its end
    at its end.

    Args:
        process: says which times these noise levels are.
        u: uniform numbers in (0, 1).
        mean, std: P_mean and P_std there; -0.4 and 1.0 in Karras et al. 2024.
    """
    return process.time_of(-(mean + std * torch.special.ndtri(u))).clamp(max=process.end)


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"a shift is positive, and 1 shifts nothing, got {shift:g}")
