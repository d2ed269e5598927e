"""Random orders that are functions of a seed and of what they are for."""

import hashlib

import numpy as np


def generator(seed: int, *names: object) -> np.random.Generator:
    """Numpy's generator on Philox, keyed by a hash of the seed and the names.

    As with `ldm_core.random.permutation`, what numpy makes of it is tied to numpy's release.
    """
    text = "\0".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def shuffled(n: int, seed: int, *names: object) -> np.ndarray:
    """A random order of range(n), (n,) int64."""
    return generator(seed, *names).permutation(n)
