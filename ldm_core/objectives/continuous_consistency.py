"""Continuous-time consistency on TrigFlow, x_t = cos t x0 + sin t eps (Lu & Song 2024, sCM).

The network F predicts v, so f(x_t, t) = cos t x_t - sin t F(x_t, t). Along dx/dt = v,

    df/dt = -cos t (F - v) - sin t (x_t + dF/dt)

which a consistency function keeps at zero. Training follows the tangent g = cos t df/dt. Latents
are to have unit variance (sigma_data = 1 there).
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.process import over_dimensions
from ldm_core.objectives.regression import mean_square


@torch.no_grad()
def consistency_tangent(
    network: Network, x_t: Tensor, t: Tensor, v: Tensor, cond: Condition, warmup: float = 1.0
) -> tuple[Tensor, Tensor]:
    """F and g = -cos^2 t (F - v) - r cos t sin t (x_t + dF/dt) (Lu & Song 2024, Algorithm 1).

    dF/dt comes by forward-mode differentiation, of which the fused attention kernels have none.

    Args:
        network: F.
        x_t: (B, ...).
        t: (B,) in [0, pi / 2].
        v: (B, ...) dx/dt: the teacher's velocity, or cos t eps - sin t x0 without a teacher.
        cond: B conditions.
        warmup: r, from 0 to 1 over the first steps: the derivative is unreliable at first.

    Returns:
        Both (B, ...), without gradients.
    """
    cos, sin = over_dimensions(t.cos(), x_t), over_dimensions(t.sin(), x_t)

    def at(x: Tensor, time: Tensor) -> Tensor:
        return network(x, time, cond)

    with sdpa_kernel(SDPBackend.MATH):  # scaled before, as dF/dt alone may overflow near pure noise
        dual = torch.func.jvp(at, (x_t, t), (cos * sin * v, t.cos() * t.sin()))
    value, scaled = dual[0], dual[1]
    return value, -(cos.square()) * (value - v) - warmup * (cos * sin * x_t + scaled)


def normalised_tangent(tangent: Tensor, offset: float = 0.1) -> Tensor:
    """g / (||g|| + c), sample by sample: (B, ...) -> (B, ...) (Lu & Song 2024, Algorithm 1)."""
    norm = torch.linalg.vector_norm(tangent.flatten(1), dim=1)
    return tangent / over_dimensions(norm + offset, tangent)


def continuous_consistency_loss(
    network: Network,
    x_t: Tensor,
    t: Tensor,
    v: Tensor,
    cond: Condition,
    warmup: float = 1.0,
    offset: float = 0.1,
) -> Tensor:
    """||F - sg[F + g / (||g|| + c)]||^2, whose gradient is that of following g.

    Args:
        network: F, trained.
        x_t: (B, ...) noisy latents.
        t: (B,).
        v: (B, ...) dx/dt as in `consistency_tangent`.
        cond: B conditions.
        warmup: r there, `min(1, step / 10_000)`.
        offset: c.

    Returns:
        (B,), to be weighted by a learned log-variance (`uncertainty_weighted`). Its value says
        nothing about progress: it is ||g||^2 / (||g|| + c)^2 over the dimension.
    """
    value, tangent = consistency_tangent(network, x_t, t, v, cond, warmup)
    return mean_square(network(x_t, t, cond), value + normalised_tangent(tangent, offset))
