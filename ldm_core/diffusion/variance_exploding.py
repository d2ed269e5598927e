"""Noise added to data that keeps its size: the variance-exploding process of EDM."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VarianceExploding:
    """alpha_t = 1 and sigma_t = t, so that time is the noise level (Karras et al. 2022, Table 1).

    Attributes:
        sigma_max: where sampling starts, far above the data's own spread.
    """

    sigma_max: float = 80.0

    @property
    def end(self) -> float:
        """sigma_max."""
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        """sigma_max."""
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """0 everywhere."""
        return torch.zeros_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """1 everywhere."""
        return torch.ones_like(t)

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """exp(-lambda)."""
        return (-half_log_snr).exp()
