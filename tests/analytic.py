"""Distributions whose denoiser, velocity and flow map are known in closed form."""

import numpy as np
import torch
from scipy.stats import norm

from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, Process, over_dimensions

MEAN, STD = 0.7, 0.4


def caption(mean: float, std: float = STD, batch: int = 1) -> TextCondition:
    """The condition "the data is N(mean, std^2) in every dimension", in its pooled vector."""
    pooled = torch.tensor([[mean, std]], dtype=torch.float64).expand(batch, 2)
    return TextCondition(
        torch.zeros(batch, 1, 1, dtype=torch.float64), torch.ones(batch, 1, dtype=bool), pooled
    )


def gaussian_x0(x_t, t, cond):
    """E[x0 | x_t] of a flow on N(m, S^2): m + alpha S^2 / V_t (x_t - alpha m)."""
    m, s = cond.pooled[:, :1], cond.pooled[:, 1:]
    t = over_dimensions(t, x_t)
    alpha = 1 - t
    return m + alpha * s**2 / (alpha**2 * s**2 + t**2) * (x_t - alpha * m)


def gaussian_velocity(x_t, t, cond):
    """E[eps - x0 | x_t], without a division by t."""
    m, s = cond.pooled[:, :1], cond.pooled[:, 1:]
    t = over_dimensions(t, x_t)
    alpha = 1 - t
    return -m + (t - alpha * s**2) / (alpha**2 * s**2 + t**2) * (x_t - alpha * m)


def gaussian_map(x_t, t, r, cond):
    """Where the probability-flow ODE takes x_t: alpha_r m + sqrt(V_r / V_t) (x_t - alpha_t m)."""
    m, s = cond.pooled[:, :1], cond.pooled[:, 1:]
    t, r = over_dimensions(t, x_t), over_dimensions(r, x_t)
    v_t, v_r = (1 - t) ** 2 * s**2 + t**2, (1 - r) ** 2 * s**2 + r**2
    return (1 - r) * m + torch.sqrt(v_r / v_t) * (x_t - (1 - t) * m)


def gaussian_average_velocity(x_t, t, r, cond):
    """(x_t - x_r) / (t - r), for r < t."""
    return (x_t - gaussian_map(x_t, t, r, cond)) / over_dimensions(t - r, x_t)


def gaussian_denoiser() -> Denoiser:
    return Denoiser(gaussian_velocity, FlowProcess(), Prediction.VELOCITY)


class Mixture:
    """A one-dimensional Gaussian mixture under any process, by default the flow; x is (B, 1)."""

    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    means = torch.tensor([-1.5, 0.4, 2.0], dtype=torch.float64)
    stds = torch.tensor([0.35, 0.25, 0.5], dtype=torch.float64)

    def __init__(self, process: Process | None = None) -> None:
        self.process = FlowProcess() if process is None else process

    def x0(self, x_t, t, cond):
        """E[x0 | x_t]: the components' estimates weighted by their posterior."""
        t = over_dimensions(t, x_t)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        variance = alpha**2 * self.stds**2 + sigma**2  # (B, 3)
        residual = x_t - alpha * self.means
        log_joint = self.weights.log() - variance.log() / 2 - residual**2 / variance / 2
        each = self.means + alpha * self.stds**2 / variance * residual
        return (log_joint.softmax(dim=-1) * each).sum(dim=-1, keepdim=True)

    def denoiser(self, prediction: Prediction = Prediction.X0) -> Denoiser:
        """The exact denoiser, with a network that predicts what is asked for."""

        def network(x_t, t, cond):
            x0 = self.x0(x_t, t, cond)
            return convert(x0, x_t, t, self.process, Prediction.X0, prediction)

        return Denoiser(network, self.process, prediction)

    def levels(self, t: float) -> tuple[float, float]:
        time = torch.as_tensor(t, dtype=torch.float64)
        return float(self.process.alpha(time)), float(self.process.sigma(time))

    def cdf(self, x: np.ndarray, t: float) -> np.ndarray:
        alpha, sigma = self.levels(t)
        spread = np.sqrt(alpha**2 * self.stds.numpy() ** 2 + sigma**2)
        return norm.cdf((x[:, None] - alpha * self.means.numpy()) / spread) @ self.weights.numpy()

    def flow_map(self, x: np.ndarray, t: float, r: float) -> np.ndarray:
        """The ODE is monotone and keeps the marginals, so it maps quantiles to quantiles."""
        bound = 9 * sum(self.levels(r))
        target, low, high = self.cdf(x, t), np.full_like(x, -bound), np.full_like(x, bound)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, r) < target
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


def order(errors: list[float], factor: float = 2.0) -> float:
    """Mean convergence order of errors at step counts that grow by `factor`."""
    return float(np.mean(np.diff(-np.log(errors))) / np.log(factor))
