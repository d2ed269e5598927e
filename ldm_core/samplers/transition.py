"""The one step that stochastic samplers are made of.

An estimate x0 splits a state into data and noise, x_t = alpha_t x0 + sigma_t eps. A step keeps a
share of that noise and draws the rest anew (Song et al. 2021, Eq. 12):

    x_r = alpha_r x0 + sigma_r (keep eps + sqrt(1 - keep^2) z)

Of a point mass this gives the marginal at r whatever `keep` is, and at r = 0 it gives x0. With
rho = sigma / alpha, the noise beside data of size 1, and q = rho_r / rho_t = exp(-h):

    keep = 1                            the probability-flow ODE
    keep = sqrt(1 - eta^2 (1 - q^2))    DDIM with eta, ancestral samplers, DPM-Solver++ (SDE)
    keep = q                            DDPM, which is eta = 1
    keep = q^eta                        SDE-DPM-Solver++ (2M)
    keep = phi(rho_r) / phi(rho_t) / q  ER-SDE
    keep = 0                            consistency models

Nothing but levels enters, so a sampler made of these takes the same path on every process. It is
written for x and x0, not for eps and rho, to be finite from pure noise (rho infinite, q = 0).
"""

import torch
from torch import Tensor

from ldm_core.diffusion.process import PURE_NOISE, Process


def transition(
    process: Process, x: Tensor, x0: Tensor, t: Tensor, r: Tensor, keep: Tensor, z: Tensor
) -> Tensor:
    """The step of this module.

    Args:
        process: gives the levels.
        x: (B, ...) the state at t.
        x0: (B, ...) the estimate of the data.
        t, r: 0-dim times, r < t.
        keep: 0-dim, in [0, 1].
        z: (B, ...) standard normal.

    Returns:
        (B, ...) the state at r.
    """
    drawn = process.sigma(r.double()) * (1 - keep.square()).sqrt()
    return transition_mean(process, x, x0, t, r, keep) + drawn * z.to(x.dtype)


def transition_mean(
    process: Process, x: Tensor, x0: Tensor, t: Tensor, r: Tensor, keep: Tensor | float
) -> Tensor:
    """alpha_r x0 + sigma_r keep eps; arguments and result as in `transition`."""
    t, r = t.double(), r.double()
    shrink = keep * process.sigma(r) / process.sigma(t)
    return shrink * x + (process.alpha(r) - shrink * process.alpha(t)) * x0


def noise_to_signal(process: Process, t: Tensor) -> Tensor:
    """rho = sigma / alpha in float64, infinite at pure noise."""
    t = t.double()
    alpha, sigma = process.alpha(t), process.sigma(t)
    return torch.where(alpha > PURE_NOISE, sigma / alpha, torch.inf)


def noise_ratio(process: Process, t: Tensor, r: Tensor) -> Tensor:
    """q = rho_r / rho_t, in [0, 1] for r < t."""
    return (noise_to_signal(process, r) / noise_to_signal(process, t)).clamp(max=1)


def ancestral_share(q: Tensor, eta: float) -> Tensor:
    """`keep` of DDIM with eta: eta^2 times DDPM's variance is drawn (Song et al. 2021, Eq. 16).

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies in [0, 1], from the ODE to DDPM's noise, got {eta:g}")
    return (1 - eta**2 * (1 - q.square())).sqrt()


def time_halfway(process: Process, t: Tensor, r: Tensor, keep: Tensor | float = 1.0) -> Tensor:
    """The time halfway in lambda = -ln rho from t to where noise is down to keep rho_r.

    Returns:
        0-dim float64; t itself where there is no half, lambda being infinite at either end.
    """
    ends = noise_to_signal(process, t) * keep * noise_to_signal(process, r)
    middle = -ends.log() / 2
    return process.time_of(middle) if middle.isfinite() else t
