"""Noising processes: how data turns into noise, x_t = alpha_t x0 + sigma_t eps."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """Signal and noise levels at a time in [0, 1], data at 0; every method keeps the shape of t."""

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


@dataclass(frozen=True)
class FlowProcess:
    """The straight line from data to noise: alpha_t = 1 - t, sigma_t = t (Liu et al. 2023, Eq. 1;
    Lipman et al. 2023, Eq. 20, both with time running the other way).
    """

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


def log_snr(process: Process, t: Tensor) -> Tensor:
    """2 ln(alpha_t / sigma_t): +inf at pure data, -inf at pure noise."""
    return 2 * (process.alpha(t).log() - process.sigma(t).log())
