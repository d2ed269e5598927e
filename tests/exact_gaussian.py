"""N(m, S^2) under any process: denoiser, trajectories, and expectations without sampling."""

import numpy as np
import torch
from analytic import MEAN, STD

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, over_dimensions
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas

PROCESSES = {
    "flow": FlowProcess(),
    "trig": TrigFlow(),
    "vp sde": VPSDE(),
    "linear": DiscreteVP(linear_betas()),
    "ve": VarianceExploding(5.0),
}


class Gaussian:
    """Data N(mean, std^2) in every dimension; its functions ignore the condition."""

    def __init__(self, process=None, mean=MEAN, std=STD):
        self.process, self.mean, self.std = process or FlowProcess(), mean, std

    def moments(self, t, x):
        """alpha_t and V_t, broadcastable with x."""
        t = over_dimensions(torch.as_tensor(t, dtype=x.dtype), x)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return alpha, alpha**2 * self.std**2 + sigma**2

    def x0(self, x_t, t, cond=None):
        alpha, variance = self.moments(t, x_t)
        return self.mean + alpha * self.std**2 / variance * (x_t - alpha * self.mean)

    def velocity(self, x_t, t, cond=None):
        """m alpha' + V' / (2 V) (x_t - alpha m), without a division by sigma."""
        alpha, variance = self.moments(t, x_t)
        t = over_dimensions(t, x_t)
        d_alpha, d_sigma = self.process.alpha_derivative(t), self.process.sigma_derivative(t)
        slope = alpha * d_alpha * self.std**2 + self.process.sigma(t) * d_sigma
        return self.mean * d_alpha + slope / variance * (x_t - alpha * self.mean)

    def flow_map(self, x_t, t, r):
        alpha_t, v_t = self.moments(t, x_t)
        alpha_r, v_r = self.moments(r, x_t)
        return alpha_r * self.mean + (v_r / v_t).sqrt() * (x_t - alpha_t * self.mean)

    def consistency(self, x_t, t, cond=None):
        """Where x_t's trajectory ends: m + S (x_t - alpha m) / sqrt(V_t)."""
        return self.flow_map(x_t, t, torch.zeros_like(t))

    def denoiser(self):
        return Denoiser(self.x0, self.process, Prediction.X0)

    def posterior(self, x_t, t):
        """Two equally likely (x0, eps) with the mean and variance of all that led to x_t."""
        alpha, variance = self.moments(t, x_t)
        sigma = self.process.sigma(over_dimensions(t, x_t))
        spread = self.std * sigma / variance.sqrt()
        for sign in (-1, 1):
            x0 = self.x0(x_t, t) + sign * spread
            yield x0, (x_t - alpha * x0) / sigma


def four_points(mean=MEAN, std=STD):
    """x0 and eps, (4, 1) each: their plain mean is the expectation of any cubic in the two."""
    signs = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    return mean + std * signs[:, :1], signs[:, 1:]


def hermite(count):
    """Nodes and weights (count,) for expectations over N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
