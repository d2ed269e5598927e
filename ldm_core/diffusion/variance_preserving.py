"""Processes on the circle, alpha^2 + sigma^2 = 1: tables of betas, their limit, and TrigFlow.

On the circle a level is an angle, alpha = cos phi and sigma = sin phi. Angles are finite and smooth
from pure data (0) to pure noise (pi / 2), where log-SNR is not, so tables are interpolated in them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrigFlow:
    """phi_t = t (Lu & Song 2024, Sec. 3.1, for data of unit variance): noise at t = pi / 2."""

    end = math.pi / 2
    prior_std = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """cos t."""
        return t.cos()

    def sigma(self, t: Tensor) -> Tensor:
        """sin t."""
        return t.sin()

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """-sin t."""
        return -t.sin()

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """cos t."""
        return t.cos()

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The angle whose cotangent is exp(lambda)."""
        return angle_of(half_log_snr)


@dataclass(frozen=True)
class VPSDE:
    """The variance-preserving SDE with beta(t) = beta_min + t (beta_max - beta_min)
    (Song et al. 2021, Eq. 33): ln alpha_t = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2.

    sigma' is infinite at t = 0, where sigma starts like sqrt(beta_min t).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    end = 1.0
    prior_std = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """exp of the integral of -beta / 2."""
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2), exact where alpha is nearly 1."""
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """-beta alpha / 2."""
        return -self._beta(t) / 2 * self.alpha(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """beta alpha^2 / (2 sigma)."""
        return self._beta(t) / 2 * self.alpha(t).square() / self.sigma(t)

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """The positive root of the quadratic for ln alpha = -ln(1 + exp(-2 lambda)) / 2."""
        log_alpha = -torch.nn.functional.softplus(-2 * half_log_snr) / 2
        slope, half = self.beta_max - self.beta_min, self.beta_min / 2
        return -2 * log_alpha / (half + (half**2 - slope * log_alpha).sqrt())

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -(t.square()) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2


class DiscreteVP:
    """DDPM's process (Ho et al. 2020, Eq. 4), given by a table of betas, at every time.

    Step i of the table, counted from 0, is at t = (i + 1) / T; t = 0 is the data itself. Between
    two steps the angle is interpolated linearly, so levels at the steps are the table's.

    Attributes:
        angles: (T + 1,) float64, phi at t = 0, 1/T, ..., 1.
    """

    end = 1.0
    prior_std = 1.0

    def __init__(self, betas: Tensor) -> None:
        """`betas` (T,), each in (0, 1]; the last may be 1 (zero terminal SNR).

        Raises:
            ValueError: a beta outside (0, 1].
        """
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"betas are to lie in (0, 1], these run from {betas.min():g} to {betas.max():g}"
            )
        log_alpha_bar = torch.log1p(-betas.double()).cumsum(0)  # of alpha^2
        sigma, alpha = (-torch.expm1(log_alpha_bar)).sqrt(), (log_alpha_bar / 2).exp()
        self.angles = torch.nn.functional.pad(torch.atan2(sigma, alpha), (1, 0))

    @property
    def steps(self) -> int:
        """T, length of the table."""
        return len(self.angles) - 1

    def time_of_step(self, step: Tensor) -> Tensor:
        """The time of a table's row, which networks of this family take as a number in 0..T-1."""
        return (step + 1) / self.steps

    def step_of(self, t: Tensor) -> Tensor:
        """The row at a time; between rows a fraction, and -1 at the data."""
        return t * self.steps - 1

    def alpha(self, t: Tensor) -> Tensor:
        """cos phi_t."""
        return self._angle(t)[0].cos()

    def sigma(self, t: Tensor) -> Tensor:
        """sin phi_t."""
        return self._angle(t)[0].sin()

    def alpha_derivative(self, t: Tensor) -> Tensor:
        """-sin(phi_t) phi_t'; from the right at a row of the table."""
        angle, slope = self._angle(t)
        return -angle.sin() * slope

    def sigma_derivative(self, t: Tensor) -> Tensor:
        """cos(phi_t) phi_t'; from the right at a row of the table."""
        angle, slope = self._angle(t)
        return angle.cos() * slope

    def time_of(self, half_log_snr: Tensor) -> Tensor:
        """Where the angle has that cotangent; [0, 1] even beyond the table."""
        angle = angle_of(half_log_snr)
        angles = self.angles.to(angle)
        right = torch.searchsorted(angles, angle.contiguous()).clamp(1, self.steps)
        low, high = angles[right - 1], angles[right]
        return ((right - 1 + (angle - low) / (high - low)) / self.steps).clamp(0, 1)

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """phi_t and its slope."""
        angles = self.angles.to(t)
        left = (t.detach() * self.steps).floor().long().clamp(0, self.steps - 1)
        slope = (angles[left + 1] - angles[left]) * self.steps
        return angles[left] + (t - left.to(t) / self.steps) * slope, slope


def angle_of(half_log_snr: Tensor) -> Tensor:
    """phi with cot phi = exp(lambda), accurate at both ends."""
    return torch.atan2((-half_log_snr / 2).exp(), (half_log_snr / 2).exp())


def linear_betas(first: float = 1e-4, last: float = 0.02, steps: int = 1000) -> Tensor:
    """(T,) equally spaced (Ho et al. 2020, Sec. 4)."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def scaled_linear_betas(first: float = 0.00085, last: float = 0.012, steps: int = 1000) -> Tensor:
    """(T,) with equally spaced roots, as latent diffusion has them (Rombach et al. 2022)."""
    return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()


def cosine_betas(steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> Tensor:
    """(T,) for alpha_t^2 = cos^2((t + s) / (1 + s) pi / 2) (Nichol & Dhariwal 2021, Eq. 17)."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = ((t + offset) / (1 + offset) * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=most)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The table shifted and scaled so that alpha_T = 0 and alpha_1 stays (Lin et al. 2024, Alg. 1).

    Networks for it predict anything but eps, which says nothing at pure noise.
    """
    alpha = torch.log1p(-betas.double()).cumsum(0).div(2).exp()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    ratio = alpha[1:].square() / alpha[:-1].square()
    return torch.cat([1 - alpha[:1].square(), 1 - ratio])
