"""The noise of posterior draws: a function of (seed, epoch, sample id), at the speed of a reader.

It is drawn on CPUs, for every number of every latent, where `ldm_core.random`, whose bits are those
of every device, takes many times as long. Numpy vouches for the bits of its Philox-4x64-10 (Salmon
et al. 2011) in all its releases; 16 of them choose a quantile, which costs no logarithm.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# At half a standard deviation they lie 4e-5 apart, none is farther than 4.3 from 0: the
# stored means, to which they are added, are rounded to 16 bits themselves.
LEVELS = 2**16


def posterior_noise(seed: int, epochs: Tensor, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, (B, *shape) float32: each one of `LEVELS` that are equally likely.

    Args:
        seed: of the run.
        epochs: (B,) int64, of each sample.
        ids: (B,) int64 sample ids; a sample's numbers do not depend on its neighbours.
        shape: of a latent.
    """
    size = math.prod(shape)
    noise = np.empty((len(ids), size), np.float32)
    # a sample at a time: its bits are still in the cache when their quantiles are looked up
    for row, levels in zip(noise, _levels(seed, epochs, ids, size), strict=True):
        _QUANTILES.take(levels, out=row, mode="clip")  # the one mode that writes without a copy
    return torch.from_numpy(noise).view(len(ids), *shape)


def _quantiles() -> np.ndarray:
    """(LEVELS,) float32: the normal distribution's in the middle of equal shares, at variance 1."""
    middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    values = torch.special.ndtri(middles)
    return (values / values.std(correction=0)).to(torch.float32).numpy()


_QUANTILES = _quantiles()


def _levels(seed: int, epochs: Tensor, ids: Tensor, size: int) -> Iterator[np.ndarray]:
    """Of each (size,) uint16, four to a word; the counter of words is (block, epoch, id, 0)."""
    digest = hashlib.blake2b(f"{seed}\0posterior".encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    state = source.state
    for epoch, id in zip(epochs.tolist(), ids.tolist(), strict=True):
        state["state"]["counter"][:] = (0, epoch, id, 0)
        state["buffer_pos"] = 4  # nothing is left of the last sample's
        source.state = state
        yield source.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")[:size]
