"""Which samples each global step has: the mixture, cut into batches, dealt to lanes, in windows.

Nothing is read here. The state of a run is its step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm_core.errors import UserError
from ldm_core.reading.lanes import Lanes, Slot
from ldm_core.reading.mixture import Mixture, Pieces
from ldm_core.reading.shuffles import shuffled
from ldm_core.reading.windows import LaneWindows, Part

Key = tuple[int, str, int, int]  # of a window: epoch, bucket, lane, and its number among them


@dataclass(frozen=True)
class Stretch:
    """Some samples of a window, in its shuffled order: from start to end.

    Attributes:
        key: of the window.
    """

    key: Key
    start: int
    end: int


class Order:
    """The order of a run.

    Attributes:
        buckets: names, sorted.
        batch_sizes: of each bucket, samples of a full batch.
        lanes: M, batches of a step.
    """

    def __init__(
        self,
        mixture: Mixture,
        lanes: int,
        batch_sizes: Mapping[str, int],
        window_samples: Mapping[str, int],
        seed: int,
    ) -> None:
        """Make the order.

        Args:
            mixture: of stores.
            lanes: M.
            batch_sizes: of each bucket.
            window_samples: of each bucket, samples within which a window's pieces begin.
            seed: of the run.

        Raises:
            UserError: no lane.
        """
        if lanes < 1:
            raise UserError(f"{lanes} lanes: a step has at least one micro-batch")
        self.buckets, self.lanes = mixture.buckets, lanes
        self.batch_sizes = dict(batch_sizes)
        self._windows, self._seed = dict(window_samples), seed
        self._samples = lru_cache(maxsize=8 * len(self.buckets))(mixture.samples)
        self._lanes = Lanes(lanes, seed, lru_cache(maxsize=8)(self._batches))
        # of two epochs, the one at hand and the one to come
        self._pieces = lru_cache(maxsize=2 * len(self.buckets))(mixture.pieces)
        self._lane_windows = lru_cache(maxsize=2 * len(self.buckets) * lanes)(self._cut)
        self._shuffles = lru_cache(maxsize=2 * len(self.buckets) * lanes)(self._shuffle)

    def samples(self, epoch: int) -> int:
        """Of an epoch."""
        return sum(self._samples(name, epoch) for name in self.buckets)

    def steps(self, epoch: int) -> range:
        """The steps that have a batch of an epoch; the first and last may have another's too."""
        start, end = self._lanes.first(epoch), self._lanes.first(epoch + 1)
        return range(start // self.lanes, -(-end // self.lanes))

    def position(self, step: int) -> tuple[int, float]:
        """The epoch of a step's first batch, and which share of the epoch's batches is done."""
        batch = step * self.lanes
        epoch = self._lanes.epoch_of(batch)
        start, end = self._lanes.first(epoch), self._lanes.first(epoch + 1)
        return epoch, (batch - start) / (end - start)

    def slot(self, step: int, lane: int) -> Slot:
        """What a lane takes at a step."""
        return self._lanes.slot(step, lane)

    def name(self, slot: Slot) -> str:
        """The bucket of a slot."""
        return self.buckets[slot.bucket]

    def size(self, slot: Slot, lane: int) -> int:
        """Samples of a lane's slot: only the last batch of a bucket and epoch has fewer."""
        name = self.name(slot)
        size = self.batch_sizes[name]
        first = int(self._lanes.deal(slot.epoch).starts[lane, slot.bucket]) + slot.place
        return min(size, self._samples(name, slot.epoch) - first * size)

    def stretches(self, slot: Slot, lane: int) -> list[Stretch]:
        """Where a lane's slot has its samples."""
        name = self.name(slot)
        windows = self.windows(slot.epoch, name, lane)
        start = slot.place * self.batch_sizes[name]
        return [
            Stretch((slot.epoch, name, lane, window), begin, end)
            for window, begin, end in windows.spans(start, start + self.size(slot, lane))
        ]

    def windows(self, epoch: int, bucket: str, lane: int) -> LaneWindows:
        """A lane's windows."""
        return self._lane_windows(epoch, bucket, lane)

    def shuffle(self, key: Key) -> np.ndarray:
        """A window's order: which of its parts' rows, laid end to end, comes at each place."""
        return self._shuffles(key)

    def parts(self, key: Key) -> list[Part]:
        """What a window is made of."""
        epoch, bucket, lane, window = key
        return self.windows(epoch, bucket, lane).parts(window)

    def next(self, key: Key) -> Key | None:
        """The window that its lane needs of its bucket after this one, if it can be foreseen."""
        epoch, bucket, lane, window = key
        if window + 1 < len(self.windows(epoch, bucket, lane)):
            return epoch, bucket, lane, window + 1
        sizes = self._lanes.deal(epoch + 1).sizes
        return (epoch + 1, bucket, lane, 0) if sizes[lane, self.buckets.index(bucket)] else None

    def _batches(self, epoch: int) -> np.ndarray:
        """Of each bucket in an epoch."""
        counts = [-(-self._samples(name, epoch) // self.batch_sizes[name]) for name in self.buckets]
        return np.array(counts, np.int64)

    def _cut(self, epoch: int, bucket: str, lane: int) -> LaneWindows:
        deal, number = self._lanes.deal(epoch), self.buckets.index(bucket)
        size, first = self.batch_sizes[bucket], int(deal.starts[lane, number])
        pieces: Pieces = self._pieces(bucket, epoch)
        high = min((first + int(deal.sizes[lane, number])) * size, int(pieces.starts[-1]))
        return LaneWindows(pieces, first * size, high, self._windows[bucket])

    def _shuffle(self, key: Key) -> np.ndarray:
        epoch, bucket, lane, window = key
        count = self.windows(epoch, bucket, lane).samples(window)
        return shuffled(count, self._seed, "window", epoch, bucket, lane, window)


def batch_sizes(
    buckets: Mapping[str, object], budget: int, tokens: Callable[[str], int]
) -> dict[str, int]:
    """Samples of a batch of each bucket: as many as the budget of tokens has room for, at least 1.

    Raises:
        UserError: a budget or a number of tokens below 1.
    """
    found = {name: tokens(name) for name in buckets}
    wrong = {name: count for name, count in found.items() if count < 1}
    if budget < 1 or wrong:
        raise UserError(
            f"a budget of {budget} tokens for samples of {wrong or found} tokens: all are to be "
            "at least 1"
        )
    return {name: max(1, budget // count) for name, count in found.items()}


def window_samples(
    mixture: Mixture, bytes_per_sample: Mapping[str, int], window_bytes: int
) -> dict[str, int]:
    """Samples of each bucket's windows: the same share of every bucket, all within so many bytes.

    Raises:
        UserError: not a positive number of bytes.
    """
    if window_bytes < 1:
        raise UserError(f"window_bytes is {window_bytes}: give a lane's windows some memory")
    counts = {name: max(1, mixture.samples(name, 0)) for name in mixture.buckets}
    total = sum(count * bytes_per_sample[name] for name, count in counts.items())
    return {name: max(1, count * window_bytes // total) for name, count in counts.items()}
