"""Counter-based randomness: numbers that are a function of (seed, stream, step, sample id).

What a sample draws depends neither on the rest of its batch nor on the number of workers, and a
run resumed at step k draws what the uninterrupted one would have. The bits are the same on every
device; the floats made from them are the same up to the rounding of log and cos.

Philox-4x32-10: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Sec. 3.3.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

Counter = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def random_bits(key: tuple[int, int], counter: Counter) -> Counter:
    """Philox-4x32-10: four 32-bit words for every 128-bit counter.

    Args:
        key: two 32-bit words.
        counter: four int64 tensors of 32-bit words, least significant first, that broadcast.

    Returns:
        Four int64 tensors of words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, stream: str, step: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in (0, 1), neither end included.

    Args:
        seed: of the run.
        stream: what the numbers are for, e.g. "timestep"; streams are independent.
        step: training step or epoch, in [0, 2^32).
        ids: (B,) int64 sample ids.
        shape: of one sample's draw; () gives (B,).

    Returns:
        (B, *shape) float32 on the device of `ids`.
    """
    bits = _sample_bits(seed, stream, step, ids, math.prod(shape))
    return ((bits >> 9).to(torch.float32) + 0.5).mul_(2.0**-23).view(len(ids), *shape)


def normal(seed: int, stream: str, step: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers by Box & Muller (1958); arguments and result as in `uniform`."""
    size = math.prod(shape)
    half = (size + 1) // 2
    bits = _sample_bits(seed, stream, step, ids, 2 * half)
    first, second = ((bits.to(torch.float32) + 0.5) * 2.0**-32).chunk(2, dim=1)  # (B, half), (0, 1]
    radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * math.pi * second
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return pairs[:, :size].reshape(len(ids), *shape)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A random order of range(n), (n,) int64: the sample order of an epoch.

    Drawn by numpy's `Generator(Philox(key))`, the key being a hash of seed and epoch. Numpy may
    change the algorithm between releases, so the order is tied to the numpy a run was made with.
    """
    key0, key1 = _key(seed, "permutation", str(epoch))
    return np.random.Generator(np.random.Philox(key=key0 << 32 | key1)).permutation(n)


def _multiply(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words."""
    product = words * constant  # wraps around modulo 2^64: every bit of it is right
    return (product >> 32) & _WORD, product & _WORD


def _key(seed: int, *names: str) -> tuple[int, int]:
    """Two words that tell every (seed, names) apart."""
    text = "\0".join((str(seed), *names))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _sample_bits(seed: int, stream: str, step: int, ids: Tensor, size: int) -> Tensor:
    """(B, size) words; the counter is (block of four words, step, low and high word of the id)."""
    assert 0 <= step <= _WORD, step
    block = torch.arange((size + 3) // 4, dtype=torch.int64, device=ids.device)[None]
    ids = ids.to(torch.int64)[:, None]
    counter = (block, torch.full_like(block, step), ids & _WORD, (ids >> 32) & _WORD)
    words = torch.stack(random_bits(_key(seed, stream), counter), dim=-1)  # (B, blocks, 4)
    return words.flatten(1)[:, :size]
