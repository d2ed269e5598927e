"""Mean and spread per latent channel, by which the reader normalises."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ldm_core.errors import UserError
from ldm_core.latents.manifest import LatentStatistics

LARGEST_LOGVAR = 100.0  # exp of it is 3e43; diffusers clamps at 20
_LEAST_STD = 1e-6  # a channel that never varies must not blow up when divided by it
_MOMENTS = 3  # E mean, E mean^2, E exp(logvar)

Posterior = tuple[np.ndarray, np.ndarray]  # mean and log-variance of a batch, (B, C, h, w)


class ChannelMoments:
    """Statistics of z ~ N(mean, exp(logvar)) over samples, positions and the posterior's draw.

    Var z = Var(mean) + E[exp(logvar)]. What is kept of the samples is a sum per channel and moment,
    exact as `math.fsum` would have it over all of them. So the result has the same bits in whatever
    order and pieces the samples come, and the memory is that of a piece.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[tuple[int, int], list[float]] = {}  # by channel and moment

    def add(self, posteriors: Iterable[Posterior]) -> None:
        """Count some batches, of as many channels as those before.

        Raises:
            UserError: a log-variance of more than `LARGEST_LOGVAR`.
        """
        parts = [_moments(mean, logvar) for mean, logvar in posteriors]
        if not parts:
            return
        moments = np.concatenate(parts)
        self._count += len(moments)
        for key in np.ndindex(moments.shape[1:]):
            self._sums[key] = exact_sum([*self._sums.get(key, ()), *moments[:, *key].tolist()])

    def result(self) -> LatentStatistics | None:
        """The statistics of all that was added; None of nothing."""
        if not self._count:
            return None
        channels = len(self._sums) // _MOMENTS
        sums = [
            [math.fsum(self._sums[c, k]) / self._count for k in range(_MOMENTS)]
            for c in range(channels)
        ]
        return LatentStatistics(
            mean=tuple(first for first, _, _ in sums),
            std=tuple(
                max(math.sqrt(max(second - first**2, 0.0) + spread), _LEAST_STD)
                for first, second, spread in sums
            ),
        )


def channel_statistics(posteriors: Iterable[Posterior]) -> LatentStatistics:
    """The statistics of `ChannelMoments` over batches of at least one sample in all."""
    moments = ChannelMoments()
    moments.add(posteriors)
    result = moments.result()
    assert result, "statistics of no samples"
    return result


def exact_sum(values: Sequence[float]) -> list[float]:
    """A few numbers whose sum is exactly that of `values`, which one number can only round.

    `math.fsum` rounds once, so that what it says of the rest is the next of them: an expansion as
    in Shewchuk 1997, "Adaptive Precision Floating-Point Arithmetic and Fast Robust Geometric
    Predicates", https://doi.org/10.1007/PL00009321, section 2.
    """
    parts: list[float] = []
    while rest := math.fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
        if not math.isfinite(rest):
            break
    return parts or [0.0]


def _moments(mean: np.ndarray, logvar: np.ndarray) -> np.ndarray:
    """(B, C, 3) per sample and channel: E mean, E mean^2, E exp(logvar) over positions."""
    largest = float(logvar.max(initial=-math.inf))
    if not largest <= LARGEST_LOGVAR:  # NaN included
        raise UserError(
            f"a latent has a log-variance of {largest:g}, beyond {LARGEST_LOGVAR:g}: no statistics "
            "can be made of it. Encode with another autoencoder or in another precision"
        )
    flat = mean.astype(np.float64).reshape(*mean.shape[:2], -1)
    spread = np.exp(logvar.astype(np.float64)).reshape(*mean.shape[:2], -1)
    return np.stack([flat.mean(-1), (flat**2).mean(-1), spread.mean(-1)], axis=-1)
