"""The noise of posterior draws: a function of (seed, epoch, sample id), at the speed of a reader.

It is drawn on CPUs, for every number of every latent, and `ldm_core.random`, whose bits are those
of every device, takes four times as long there. Numpy vouches for the bits of its Philox-4x64-10
(Salmon et al. 2011) in all its releases.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 2.0**-33  # half a step of 32 bits: of 0 there is no logarithm


def posterior_noise(seed: int, epochs: Tensor, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, (B, *shape) float32, by Box & Muller (1958).

    Args:
        seed: of the run.
        epochs: (B,) int64, of each sample.
        ids: (B,) int64 sample ids; a sample's numbers do not depend on its neighbours.
        shape: of a latent.
    """
    size = math.prod(shape)
    uniform = _uniform(seed, epochs, ids, (size + 1) // 2)
    first, second = uniform.chunk(2, dim=1)
    radius = first.log().mul_(-2).sqrt_()
    angle = second * (2 * math.pi)
    result = torch.empty_like(uniform)
    cosine, sine = result.chunk(2, dim=1)
    torch.mul(radius, angle.cos(), out=cosine)
    torch.mul(radius, angle.sin_(), out=sine)
    return result[:, :size].reshape(len(ids), *shape)


def _uniform(seed: int, epochs: Tensor, ids: Tensor, pairs: int) -> Tensor:
    """(B, 2 * pairs) float32 in (0, 1]; the counter is (block, epoch, id, 0)."""
    digest = hashlib.blake2b(f"{seed}\0posterior".encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    state = source.state
    words = np.empty((len(ids), pairs), np.uint64)
    for row, epoch, id in zip(words, epochs.tolist(), ids.tolist(), strict=True):
        state["state"]["counter"][:] = (0, epoch, id, 0)
        state["buffer_pos"] = 4  # nothing is left of the last sample's
        source.state = state
        row[:] = source.random_raw(pairs)
    values = torch.from_numpy(words.view("<i4")).to(torch.float32)
    return values.mul_(2.0**-32).add_(0.5).clamp_(min=_SMALLEST)
