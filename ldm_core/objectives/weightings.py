"""How much an error counts at a time: functions of lambda = ln(alpha / sigma).

Each gives the weight of the squared error *in x0*, whatever the network predicts, so that one
weighting means one thing; `denoising_loss` turns it into the weight of the prediction's own error.
With SNR = exp(2 lambda), an unweighted error is, in terms of x0,

    in eps        SNR                   in v (on the circle)   SNR + 1
    in score      SNR / sigma^2         in a flow's velocity   (1 + sqrt(SNR))^2 = 1 / t^2

Parameters are set with `functools.partial`. All are finite wherever the weight itself is.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Weighting = Callable[[Tensor], Tensor]
"""lambda (B,) -> the weight of the squared error in x0 (B,)."""


def uniform(half_log_snr: Tensor) -> Tensor:
    """1 everywhere: errors in x0 count alike."""
    return torch.ones_like(half_log_snr)


def snr(half_log_snr: Tensor) -> Tensor:
    """SNR: errors in eps count alike, the simple loss (Ho et al. 2020, Eq. 14)."""
    return (2 * half_log_snr).exp()


def snr_plus_one(half_log_snr: Tensor) -> Tensor:
    """SNR + 1: errors in v count alike on the circle (Salimans & Ho 2022, Sec. 4)."""
    return snr(half_log_snr) + 1


def truncated_snr(half_log_snr: Tensor) -> Tensor:
    """max(SNR, 1): the larger of the errors in x0 and in eps (Salimans & Ho 2022, Sec. 4)."""
    return snr(half_log_snr).clamp(min=1)


def flow(half_log_snr: Tensor) -> Tensor:
    """(1 + sqrt(SNR))^2: errors in a flow's velocity count alike, on any process."""
    return (1 + half_log_snr.exp()).square()


def min_snr(half_log_snr: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, Eq. 8)."""
    return snr(half_log_snr).clamp(max=gamma)


def soft_min_snr(half_log_snr: Tensor, gamma: float = 4.0) -> Tensor:
    """1 / (1 / SNR + 1 / gamma): the same without the kink (Crowson et al. 2024, Sec. 3)."""
    return 1 / ((-2 * half_log_snr).exp() + 1 / gamma)


def sigmoid(half_log_snr: Tensor, bias: float = 2.0) -> Tensor:
    """SNR sigmoid(b - ln SNR): of the error in eps, sigmoid(b - ln SNR) (Kingma & Gao 2023).

    Equal to exp(b) sigmoid(ln SNR - b), which does not overflow, and so to `soft_min_snr` with
    gamma = exp(b).
    """
    return math.exp(bias) * (2 * half_log_snr - bias).sigmoid()


def edm(half_log_snr: Tensor, sigma_data: float = 1.0) -> Tensor:
    """SNR + 1 / sigma_data^2: errors of a preconditioned network count alike
    (Karras et al. 2022, Table 1, where SNR is 1 / sigma^2).
    """
    return snr(half_log_snr) + sigma_data**-2
