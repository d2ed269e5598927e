"""Mean and spread per latent channel, by which the reader normalises."""

import math
from collections.abc import Iterable

import numpy as np

from ldm_core.latents.manifest import LatentStatistics

_LEAST_STD = 1e-6  # a channel that never varies must not blow up when divided by it


def channel_statistics(posteriors: Iterable[tuple[np.ndarray, np.ndarray]]) -> LatentStatistics:
    """Statistics of z ~ N(mean, exp(logvar)) over samples, positions and the posterior's draw.

    Var z = Var(mean) + E[exp(logvar)]. The sums over samples are exactly rounded (`math.fsum`),
    so that the result does not depend on the order the samples come in.

    Args:
        posteriors: (mean, logvar) of batches, (B, C, h, w) each, of at least one sample in all.
    """
    moments = np.concatenate([_moments(mean, logvar) for mean, logvar in posteriors])
    count, channels, _ = moments.shape
    sums = [[math.fsum(moments[:, c, k]) / count for k in range(3)] for c in range(channels)]
    return LatentStatistics(
        mean=tuple(first for first, _, _ in sums),
        std=tuple(
            max(math.sqrt(max(second - first**2, 0.0) + spread), _LEAST_STD)
            for first, second, spread in sums
        ),
    )


def _moments(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """(B, C, 3) per sample and channel: E mean, E mean^2, E exp(logvar) over positions."""
    flat = mean.astype(np.float64).reshape(*mean.shape[:2], -1)
    spread = np.exp(logvar.astype(np.float64)).reshape(*mean.shape[:2], -1)
    return np.stack([flat.mean(-1), (flat**2).mean(-1), spread.mean(-1)], axis=-1)
