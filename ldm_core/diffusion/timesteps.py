"""Times to train at."""

import math

import torch
from torch import Tensor


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """logit t' = logit t + ln shift (Esser et al. 2024, Eq. 23, whose shift is sqrt(m / n)).

    A shift above 1 moves times towards noise. 0 and 1 stay where they are.
    """
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """Uniform numbers in (0, 1) -> times with logit t ~ N(mean + ln shift, std^2).

    Esser et al. 2024, Eq. 19, by inversion, so stratified uniforms give stratified times.
    """
    return torch.sigmoid(mean + math.log(shift) + std * torch.special.ndtri(u))
