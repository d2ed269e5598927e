"""Averages of weights with a power-law profile, and any such average after the fact.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", Sec. 3 and
App. C. At time t the weights of time s count p_t(s) = (g + 1) / t (s / t)^g: the memory is a share
of training so far, and its width, the standard deviation of the profile relative to t, is what one
chooses. Such profiles nearly span one another, so a few snapshots of two averages, combined by
least squares, give the average of any width at any time.
"""

import numpy as np
import torch
from torch import Tensor, nn

from ldm_core.training.ema import move_towards


def power_exponent(std: float) -> float:
    """g of the profile with that standard deviation relative to t (Karras et al. 2024, Eq. 123):

    std^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved for its largest root.

    Raises:
        ValueError: std outside (0, 0.2886), where g would be infinite or negative.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(
            f"the relative width is to lie between 0 and {12**-0.5:.4f}, a plain mean, got {std:g}"
        )
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(roots.real.max())


class PowerEma:
    """theta_avg <- b theta_avg + (1 - b) theta with b = (1 - 1 / k)^(g + 1) at update k = 1, 2, ...

    The first update forgets the initial weights altogether (Karras et al. 2024, Eq. 127).
    """

    def __init__(self, network: nn.Module, std: float) -> None:
        """`std`: of the profile, relative to the length of training; 0.05 to 0.15 is usual."""
        self.exponent = power_exponent(std)
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        """Move towards the network's present weights."""
        self.updates += 1
        beta = (1 - 1 / self.updates) ** (self.exponent + 1)
        move_towards(self.shadow, network, 1 - beta)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, loadable into the network, by name."""
        return self.shadow

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Continue from saved averages after `updates` updates."""
        self.updates = updates
        for name, value in weights.items():
            self.shadow[name].copy_(value)


def profile_products(
    times: Tensor, exponents: Tensor, other_times: Tensor, other_exponents: Tensor
) -> Tensor:
    """The integral of p p' for every pair of profiles: (n,), (n,), (m,), (m,) -> (n, m).

    (g + 1)(g' + 1) / (g + g' + 1) (t / t')^g' / t' for t <= t' (Karras et al. 2024, Eq. 151).
    """
    t, g = times.double()[:, None], exponents.double()[:, None]
    u, h = other_times.double(), other_exponents.double()
    longer, ratio = torch.maximum(t, u), torch.minimum(t, u) / torch.maximum(t, u)
    of_longer = torch.where(t < u, h, g)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio**of_longer / longer


def snapshot_shares(times: Tensor, exponents: Tensor, time: float, exponent: float) -> Tensor:
    """How much of each snapshot is in the average with another profile.

    Karras et al. 2024, Algorithm 3.

    Args:
        times: (n,) updates after which the snapshots were taken.
        exponents: (n,) of the averages they were taken of, two different ones for good results.
        time: updates after which the average is wanted, at most the last snapshot's.
        exponent: wanted, best between those there are.

    Returns:
        (n,) float64 of sum 1 that bring the profiles closest in the mean square; some are negative.

    Raises:
        ValueError: the time is after the last snapshot.
    """
    if time > times.max():
        raise ValueError(
            f"an average at {time:g} cannot be made of snapshots up to {times.max():g}"
        )
    wanted = torch.tensor([[time], [exponent]], dtype=torch.float64)
    products = profile_products(times, exponents, times, exponents)
    aims = profile_products(times, exponents, wanted[0], wanted[1])
    shares = torch.linalg.lstsq(products, aims, driver="gelsd").solution[:, 0]
    return shares / shares.sum()


def profile_error(
    times: Tensor, exponents: Tensor, shares: Tensor, time: float, exponent: float
) -> float:
    """How far shares of some profiles are from a wanted one: |sum s_i p_i - p| / |p| in L2.

    Args:
        times, exponents: (n,) of the profiles.
        shares: (n,) of them.
        time, exponent: wanted.
    """
    wanted = torch.tensor([[time], [exponent]], dtype=torch.float64)
    own = profile_products(wanted[0], wanted[1], wanted[0], wanted[1])[0, 0]
    between = profile_products(times, exponents, wanted[0], wanted[1])[:, 0]
    among = profile_products(times, exponents, times, exponents)
    squared = shares @ among @ shares - 2 * shares @ between + own
    return float((squared / own).clamp(min=0).sqrt())


def combine_snapshots(snapshots: list[dict[str, Tensor]], shares: Tensor) -> dict[str, Tensor]:
    """The weighted sum of snapshots, in float64 and back; what is not floating is the last's."""
    combined = dict(snapshots[-1])
    for name, value in combined.items():
        if value.is_floating_point():
            total = torch.zeros_like(value, dtype=torch.float64)
            for share, snapshot in zip(shares.tolist(), snapshots, strict=True):
                total.add_(snapshot[name], alpha=share)
            combined[name] = total.to(value.dtype)
    return combined


def average_of_width(
    snapshots: list[dict[str, Tensor]],
    updates: list[int],
    widths: list[float],
    time: int,
    std: float,
) -> dict[str, Tensor]:
    """The weights averaged with any profile, from snapshots of others or from shards of them.

    Args:
        snapshots: copies of `PowerEma.state_dict()`, the last one in the order of time last.
        updates: after which each was taken.
        widths: `std` of the average each was taken of.
        time: updates after which the average is wanted.
        std: width of the wanted profile, best between those there are.

    Raises:
        ValueError: the time is after the last snapshot, or an impossible width.
    """
    exponents = torch.tensor([power_exponent(width) for width in widths])
    shares = snapshot_shares(torch.tensor(updates), exponents, time, power_exponent(std))
    return combine_snapshots(snapshots, shares)
