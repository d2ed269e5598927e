"""The batches of all epochs, one after the other, dealt to lanes.

Batch g goes to lane g mod M, at step g // M: each step has M batches whatever the number of
workers, one step may hold the end of an epoch and the beginning of the next, and nothing is
dropped. Within an epoch a lane gets a stretch of each bucket's batches, so that it reads its row
groups one after the other and no other lane reads them, and mixes its buckets at random.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm_core.reading.shuffles import generator

MIXED = 1024  # about as many steps of a lane have the epoch's shares of the buckets


@dataclass(frozen=True)
class Slot:
    """A batch: the `place`-th that a lane takes of a bucket (by number) in an epoch."""

    epoch: int
    bucket: int
    place: int


@dataclass(frozen=True, eq=False)
class Deal:
    """How an epoch's batches are dealt.

    Attributes:
        first: batches before the epoch.
        sizes: (lanes, buckets) int64.
        starts: (lanes, buckets) int64, where each lane's stretch begins among a bucket's batches.
    """

    first: int
    sizes: np.ndarray
    starts: np.ndarray


def deal(batches: np.ndarray, lanes: int, first: int) -> Deal:
    """Deal an epoch's batches, so many of each bucket.

    What does not divide goes one by one to the lanes from `first` mod `lanes` on, bucket after
    bucket, so that each lane has as many in all as there are g in [first, first + sum) with
    g mod lanes = lane.
    """
    rest = batches % lanes
    begin = first + np.cumsum(rest) - rest
    extra = (np.arange(lanes)[:, None] - begin) % lanes < rest
    sizes = batches // lanes + extra
    return Deal(first, sizes, np.cumsum(sizes, axis=0) - sizes)


class Lanes:
    """Lane and step to batch, and back to the beginning of an epoch.

    Attributes:
        count: M.
    """

    def __init__(self, count: int, seed: int, batches: Callable[[int], np.ndarray]) -> None:
        """Deal to lanes.

        Args:
            count: M, at least 1.
            seed: of the run.
            batches: of each bucket in an epoch.
        """
        self.count, self._seed, self._batches = count, seed, batches
        self._firsts, self._lock = [0], threading.Lock()
        self._deal = lru_cache(maxsize=4)(self._deal_of)
        self._mix = lru_cache(maxsize=4 * count)(self._mix_of)
        self._phases = lru_cache(maxsize=4 * count)(self._phases_of)

    def first(self, epoch: int) -> int:
        """Batches before an epoch."""
        with self._lock:
            while len(self._firsts) <= epoch:
                done = len(self._firsts) - 1
                self._firsts.append(self._firsts[-1] + int(self._batches(done).sum()))
        return self._firsts[epoch]

    def epoch_of(self, batch: int) -> int:
        """The epoch that a batch, by its number over all epochs, belongs to."""
        while self._firsts[-1] <= batch:
            self.first(len(self._firsts))
        return bisect_right(self._firsts, batch) - 1

    def deal(self, epoch: int) -> Deal:
        """How an epoch's batches are dealt."""
        return self._deal(epoch)

    def slot(self, step: int, lane: int) -> Slot:
        """What a lane takes at a step."""
        epoch = self.epoch_of(step * self.count + lane)
        begin = -(-(self.first(epoch) - lane) // self.count)  # the lane's first step of the epoch
        starts, sizes, phases = self._phases(epoch, lane)
        block = int(np.searchsorted(starts, step - begin, side="right")) - 1
        labels = self._mix(epoch, lane, block)
        place = step - begin - int(starts[block])
        bucket = int(labels[place])
        before = _upto(sizes, phases, block, len(starts) - 1)[bucket]
        return Slot(epoch, bucket, int(before) + int((labels[:place] == bucket).sum()))

    def _deal_of(self, epoch: int) -> Deal:
        return deal(self._batches(epoch), self.count, self.first(epoch))

    def _phases_of(self, epoch: int, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the blocks of a lane's steps begin and end; and of each bucket how many batches it
        has, and at which phase it comes."""
        sizes = self.deal(epoch).sizes[lane]
        blocks = max(1, -(-int(sizes.sum()) // MIXED))
        phases = generator(self._seed, "phases", epoch, lane).integers(blocks, size=len(sizes))
        starts = np.zeros(blocks + 1, np.int64)
        for size, phase in zip(sizes, phases, strict=True):
            starts += _upto(size, phase, np.arange(blocks + 1), blocks)
        return starts, sizes, phases

    def _mix_of(self, epoch: int, lane: int, block: int) -> np.ndarray:
        """The bucket at each step of a block, (about MIXED,) int32."""
        starts, sizes, phases = self._phases(epoch, lane)
        blocks = len(starts) - 1
        ends = (_upto(sizes, phases, at, blocks) for at in (block, block + 1))
        before, after = ends
        labels = np.repeat(np.arange(len(sizes), dtype=np.int32), after - before)
        return generator(self._seed, "mix", epoch, lane, block).permutation(labels)


def _upto(size: np.ndarray, phase: np.ndarray, block: np.ndarray | int, blocks: int) -> np.ndarray:
    """How many of a bucket's batches the blocks before this one take: evenly, from a phase on."""
    return (size * block + phase) // blocks
