"""What a network may predict, and the one table that turns each into any other.

Every prediction is a combination of data and noise, a row of coefficients in (x0, eps):

    x_t = alpha x0 + sigma eps          (known)
    X0 = (1, 0)    EPS = (0, 1)    SCORE = (0, -1 / sigma)
    VELOCITY = (alpha', sigma')    V = (-sigma, alpha)

Two rows, x_t's and the predicted one's, determine (x0, eps) and so any third row. Solving the
2 x 2 system for the target row directly gives target = a x_t + b value, where nothing is divided
by but the determinant of x_t's row and the source's. For VELOCITY that is
alpha sigma' - sigma alpha', which is 1 for a flow at every t: x0 = x_t - t v. For EPS it is alpha
and for X0 -sigma, so those cannot be left at pure noise and pure data respectively.
"""

from enum import StrEnum

import torch
from torch import Tensor

from ldm_core.diffusion.process import Process, over_dimensions

Row = tuple[Tensor, Tensor]


class Prediction(StrEnum):
    """What the network's output means."""

    X0 = "x0"
    EPS = "eps"
    VELOCITY = "velocity"  # dx_t/dt; eps - x0 for a flow
    V = "v"  # alpha eps - sigma x0 (Salimans & Ho 2022, App. D); TrigFlow's F
    SCORE = "score"  # gradient of ln p_t, -eps / sigma

    def row(self, t: Tensor, process: Process) -> Row:
        """Coefficients of (x0, eps) at `t`, each of the shape of `t`."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        match self:
            case Prediction.X0:
                return one, zero
            case Prediction.EPS:
                return zero, one
            case Prediction.VELOCITY:
                return process.alpha_derivative(t), process.sigma_derivative(t)
            case Prediction.V:
                return -process.sigma(t), process.alpha(t)
            case Prediction.SCORE:
                return zero, -1 / process.sigma(t)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, process: Process) -> Tensor:
        """What it is of data and noise (B, ...) that are known, at `t` (B,) or 0-dim: (B, ...)."""
        of_data, of_noise = (over_dimensions(level, x0) for level in self.row(t, process))
        return of_data * x0 + of_noise * eps


def convert(
    value: Tensor,
    x_t: Tensor,
    t: Tensor,
    process: Process,
    source: Prediction,
    target: Prediction,
) -> Tensor:
    """What `target` is, given that `source` is `value`.

    Args:
        value: (B, ...) the prediction.
        x_t: (B, ...) the state it was made at.
        t: (B,) or 0-dim.
        process: gives alpha_t and sigma_t.
        source: what `value` is.
        target: what is wanted.

    Returns:
        (B, ...); not finite where the target is undetermined (see the module).
    """
    if source is target:
        return value
    t = over_dimensions(t, x_t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    s0, s1 = source.row(t, process)
    g0, g1 = target.row(t, process)
    determinant = alpha * s1 - sigma * s0
    of_state = (g0 * s1 - g1 * s0) / determinant
    of_value = (alpha * g1 - sigma * g0) / determinant
    return of_state * x_t + of_value * value
