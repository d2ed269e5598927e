"""What an epoch is: for each store a stretch of its endless passes, all stretches shuffled.

A store of weight w is gone through w times an epoch. Its passes, each a new order of its units, are
laid end to end, and epoch e takes the samples from e w N to (e + 1) w N of each bucket's N. So
weight 1 is every sample once an epoch, 2 twice, and with 0.5 two epochs make one pass: after any
number E of epochs a sample has been seen E w times, rounded down or up. The draws of a sample
depend on its pass, which at weight 1 is the epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from ldm_core.errors import UserError
from ldm_core.reading.shuffles import shuffled

_FINEST = 10**6  # the weights are fractions of at most this denominator


@dataclass(frozen=True, eq=False)
class Pieces:
    """P stretches of units in the order of an epoch, of one bucket.

    Attributes:
        source: (P,) int16, number of the store.
        unit: (P,) int32, of the store.
        turn: (P,) int32, pass of the store.
        first: (P,) int32, the first of the unit's rows in the order of its pass.
        starts: (P + 1,) int64, samples before each piece, and of all.
    """

    source: np.ndarray
    unit: np.ndarray
    turn: np.ndarray
    first: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, eq=False)
class Units:
    """A bucket's units of one store: their numbers and samples, (U,) each."""

    number: np.ndarray
    count: np.ndarray

    @cached_property
    def samples(self) -> int:
        """N."""
        return int(self.count.sum(dtype=np.int64))


class Mixture:
    """Stores and their weights.

    Attributes:
        buckets: names, sorted.
        weights: of the stores.
    """

    def __init__(
        self,
        units: Sequence[dict[str, Units]],
        weights: Sequence[float | Fraction],
        seed: int,
    ) -> None:
        """Mix the stores.

        Args:
            units: of each store, by bucket.
            weights: passes of each store in an epoch.
            seed: of the run.

        Raises:
            UserError: not a weight for each store, or one that is not positive and finite.
        """
        if len(weights) != len(units) or not units:
            raise UserError(f"{len(weights)} weights for {len(units)} stores: give each one")
        for weight in weights:
            if not (math.isfinite(weight) and Fraction(weight).limit_denominator(_FINEST) > 0):
                raise UserError(
                    f"weights {[float(each) for each in weights]}: each is to be a positive "
                    "number, how often a store is gone through in an epoch; leave out the others"
                )
        self.buckets = tuple(sorted({name for each in units for name in each}))
        self.weights = tuple(Fraction(weight).limit_denominator(_FINEST) for weight in weights)
        self._units, self._seed = tuple(units), seed

    def size(self, source: int, bucket: str) -> int:
        """N, samples of a store's bucket."""
        units = self._units[source].get(bucket)
        return units.samples if units else 0

    def interval(self, source: int, bucket: str, epoch: int) -> tuple[int, int]:
        """Where an epoch begins and ends in a store's endless passes of a bucket, in samples."""
        each = self.weights[source] * self.size(source, bucket)
        return math.floor(epoch * each), math.floor((epoch + 1) * each)

    def samples(self, bucket: str, epoch: int) -> int:
        """Of a bucket in an epoch, all stores together."""
        return sum(
            end - start
            for start, end in (
                self.interval(source, bucket, epoch) for source in range(len(self._units))
            )
        )

    def pieces(self, bucket: str, epoch: int) -> Pieces:
        """A bucket's stretches in the order of an epoch."""
        sources = range(len(self._units))
        parts = [part for source in sources for part in self._passes(source, bucket, epoch)]
        columns = zip(*parts, strict=True)
        source, unit, turn, first, count = (np.concatenate(column) for column in columns)
        order = shuffled(len(unit), self._seed, "pieces", bucket, epoch)
        starts = np.zeros(len(unit) + 1, np.int64)
        np.cumsum(count[order], out=starts[1:])
        return Pieces(source[order], unit[order], turn[order], first[order], starts)

    def _passes(self, source: int, bucket: str, epoch: int) -> list[tuple[np.ndarray, ...]]:
        """The stretches of one store: source, unit, turn, first and count of each."""
        start, end = self.interval(source, bucket, epoch)
        if start == end:
            return []
        units = self._units[source][bucket]
        size = units.samples
        found: list[tuple[np.ndarray, ...]] = []
        for turn in range(start // size, (end - 1) // size + 1):
            low, high = max(start - turn * size, 0), min(end - turn * size, size)
            order = shuffled(len(units.count), self._seed, "units", source, bucket, turn)
            place, first, count = _stretch(units.count[order], low, high)
            unit = units.number[order[place]].astype(np.int32)
            found.append(
                (
                    np.full(len(unit), source, np.int16),
                    unit,
                    np.full(len(unit), turn, np.int32),
                    first.astype(np.int32),
                    count.astype(np.int32),
                )
            )
        return found


def _stretch(counts: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of units end to end those with samples from low to high: place, first sample, samples."""
    ends = np.cumsum(counts, dtype=np.int64)
    starts = ends - counts
    place = np.arange(
        np.searchsorted(ends, low, side="right"), np.searchsorted(starts, high, side="left")
    )
    first = np.maximum(low - starts[place], 0)
    return place, first, np.minimum(high - starts[place], counts[place]) - first
