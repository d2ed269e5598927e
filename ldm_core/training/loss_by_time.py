"""How the loss depends on the time t: while training, and on rows that are held out.

The mean loss hides most of what happens: at t near 1 it says how well pictures are composed, near
0 how well they are rendered, and one can grow while the other falls.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_core import random
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Network
from ldm_core.objectives.flow_matching import flow_matching_loss

BINS = 8


class LossByTime:
    """Running means of per-sample losses in bins of t; bin k holds [k, k + 1) / `bins`."""

    def __init__(self, bins: int = BINS, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, bins, dtype=torch.float64, device=device)  # of losses; of ones

    def add(self, t: Tensor, losses: Tensor) -> None:
        """Count losses (B,) at times t (B,) in [0, 1]; what is not finite is left out."""
        losses = losses.detach().double()
        known = torch.isfinite(losses)
        bins = self.sums.shape[1]
        place = (t[known] * bins).long().clamp(0, bins - 1)
        self.sums[0].index_add_(0, place, losses[known])
        self.sums[1].index_add_(0, place, torch.ones_like(losses[known]))

    def read(self) -> dict[str, float]:
        """The mean of each bin that has any, by the middle of the bin, and start anew."""
        sums, counts = self.sums.tolist()
        self.sums.zero_()
        bins = len(counts)
        return {_name(k, bins): sums[k] / counts[k] for k in range(bins) if counts[k]}


@dataclass(frozen=True)
class HeldOut:
    """Rows that are not trained on.

    Attributes:
        latents: (B, C, H, W) or (B, C, T, H, W), normalised.
        condition: B captions.
        ids: (B,) int64, keys of their noise.
    """

    latents: Tensor
    condition: TextCondition
    ids: Tensor


@torch.no_grad()
def validation_loss(
    velocity: Network, batches: Iterable[HeldOut], seed: int, bins: int = BINS
) -> dict[str, float]:
    """Flow-matching loss of every row at the middle of every bin, with noise that is always the
    same: two networks, or two moments of one training, differ in nothing else.

    Args:
        velocity: a network that predicts the velocity.
        batches: the rows, on the network's device.
        seed: of the noise; each row and bin has its own.
        bins: of t.

    Returns:
        The mean by bin, named as in `LossByTime.read`, and that of all bins as "mean". A mean with
        a loss that is not finite is NaN, as is one of no rows: a network that computes nothing is
        not to look like a perfect one.
    """
    sums, rows = torch.zeros(bins, dtype=torch.float64), 0
    for batch in batches:
        rows += len(batch.ids)
        for k in range(bins):
            t = torch.full((len(batch.ids),), (k + 0.5) / bins)
            eps = random.normal(seed, "validation", k, batch.ids, tuple(batch.latents.shape[1:]))
            device = batch.latents.device
            losses = flow_matching_loss(
                velocity, batch.latents, eps.to(device), t.to(device), batch.condition
            )
            sums[k] += losses.double().sum().cpu()
    means = sums / rows if rows else torch.full_like(sums, math.nan)
    means[~means.isfinite()] = math.nan
    named = {_name(k, bins): mean for k, mean in enumerate(means.tolist())}
    return {**named, "mean": float(means.mean())}


def _name(k: int, bins: int) -> str:
    """Of a bin: its middle."""
    return f"t{(k + 0.5) / bins:.3f}"
