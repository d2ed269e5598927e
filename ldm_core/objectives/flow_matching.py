"""Flow matching: regress the velocity of the straight line from data to noise."""

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.process import FlowProcess, add_noise
from ldm_core.objectives.regression import mean_square


def flow_matching_loss(
    velocity: Network, x0: Tensor, eps: Tensor, t: Tensor, cond: Condition
) -> Tensor:
    """||v(x_t, t, cond) - (eps - x0)||^2 at x_t = (1 - t) x0 + t eps (Lipman et al. 2023, Eq. 23).

    Args:
        velocity: a network that predicts the velocity, or `Denoiser.velocity`.
        x0: (B, ...) latents.
        eps: (B, ...) standard normal noise.
        t: (B,) times in [0, 1].
        cond: B conditions.

    Returns:
        (B,) mean over a sample's dimensions, in float32 or wider.
    """
    x_t = add_noise(FlowProcess(), x0, eps, t)
    return mean_square(velocity(x_t, t, cond), eps - x0)


def contrastive_flow_matching_loss(
    velocity: Network,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    other: Tensor,
    weight: float = 0.05,
) -> Tensor:
    """||v - (eps - x0)||^2 - w ||v - (eps' - x0')||^2 with another sample's data and noise.

    Conditions are pushed apart (Stoica et al. 2025, "Contrastive flow matching"). The
    minimiser is (v* - w E[eps' - x0']) / (1 - w) and not the velocity v* itself, so mind the
    scale of guidance.

    Args:
        velocity: a network that predicts the velocity.
        x0: (B, ...) latents.
        eps: (B, ...) standard normal noise.
        t: (B,) times in [0, 1].
        cond: B conditions.
        other: (B,) for each sample the index of the one it is contrasted with.
        weight: w in [0, 1).

    Returns:
        (B,), which may be negative.
    """
    v = velocity(add_noise(FlowProcess(), x0, eps, t), t, cond)
    target = eps - x0
    return mean_square(v, target) - weight * mean_square(v, target[other])
