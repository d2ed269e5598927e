"""Noising processes: how data turns into noise, x_t = alpha_t x0 + sigma_t eps.

Data is at t = 0 and noise at t = `end`; what lies between is each process's own affair, so solvers
speak of levels, or of lambda_t = ln(alpha_t / sigma_t), which every process can turn into a time.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PURE_NOISE = 1e-7  # alpha / sigma below which there is no signal


class Process(Protocol):
    """Signal and noise levels at times in [0, end]; every method keeps the shape of its argument.

    Attributes:
        end: the time of the most noise.
        prior_std: sampling starts from N(0, prior_std^2) there.
    """

    @property
    def end(self) -> float:
        """The time of the most noise."""
        ...

    @property
    def prior_std(self) -> float:
        """Standard deviation of what sampling starts from."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level alpha_t."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level sigma_t."""
        ...

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """The derivative of alpha_t by t."""
        ...

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """The derivative of sigma_t by t."""
        ...

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The t with ln(alpha_t / sigma_t) as given: the inverse of `half_log_snr`."""
        ...


@dataclass(frozen=True)
class FlowProcess:
    """The straight line from data to noise: alpha_t = 1 - t, sigma_t = t (Liu et al. 2023, Eq. 1;
    Lipman et al. 2023, Eq. 20, both with time running the other way).
    """

    end = 1.0
    prior_std = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """-1 everywhere."""
        return -torch.ones_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(t)

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """ln((1 - t) / t) = lambda."""
        return torch.sigmoid(-half_log_snr)


def batch_time(t: Tensor | float, x: Tensor) -> Tensor:
    """A time for every sample of `x`: a number, 0-dim or (B,) tensor -> (B,) on its device.

    The dtype is that of `x`, but at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(t, dtype=dtype, device=x.device).expand(len(x))


def over_dimensions(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `x`; a 0-dim tensor stays as it is."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


def add_noise(process: Process, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps, for x0 and eps (B, ...) and t (B,) or 0-dim."""
    t = over_dimensions(t, x0)
    return process.alpha(t) * x0 + process.sigma(t) * eps


def half_log_snr(process: Process, t: Tensor) -> Tensor:
    """lambda_t = ln(alpha_t / sigma_t): +inf at pure data, -inf at pure noise.

    An alpha below 1e-7 sigma is what rounding leaves of pure noise, as cos(pi / 2) is, even below
    zero if the time is in float32.
    """
    snr = process.alpha(t) / process.sigma(t)
    return torch.where(snr > PURE_NOISE, snr, 0.0).log()


def log_snr(process: Process, t: Tensor) -> Tensor:
    """ln(alpha_t^2 / sigma_t^2), twice `half_log_snr`."""
    return 2 * half_log_snr(process, t)


def drift_rate(process: Process, t: Tensor) -> Tensor:
    """f_t of the forward SDE dx = f_t x dt + g_t dW: alpha' / alpha (Kingma et al. 2021).

    -inf at pure noise, see `half_log_snr`.
    """
    alpha = process.alpha(t)
    rate = process.alpha_derivative(t) / alpha
    return torch.where(alpha > PURE_NOISE * process.sigma(t), rate, -torch.inf)


def squared_diffusion(process: Process, t: Tensor) -> Tensor:
    """g_t^2 of the forward SDE: (sigma^2)' - 2 f sigma^2 (Kingma et al. 2021)."""
    sigma = process.sigma(t)
    return 2 * sigma * (process.sigma_derivative(t) - drift_rate(process, t) * sigma)
