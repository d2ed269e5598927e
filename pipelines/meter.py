"""How fast a training worker is, and how long it waits for data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Meter:
    """Samples per second and the share of time spent waiting for data, since it was last read."""

    def __init__(self) -> None:
        self._began, self._counted = time.monotonic(), 0
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._samples = time.monotonic(), 0.0, 0

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each of them comes is waiting for data."""
        begin = time.monotonic()
        for item in items:
            self._waited += time.monotonic() - begin
            yield item
            begin = time.monotonic()

    def count(self, samples: int) -> None:
        """Samples that a step of all workers used."""
        self._samples += samples
        self._counted += samples

    def mean(self) -> dict[str, float]:
        """The rate since the meter was made: of this attempt, not of what an earlier one did."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        return {"mean_samples_per_second": self._counted / elapsed}

    def elapsed(self) -> float:
        """Seconds since it was last read."""
        return max(time.monotonic() - self._start, 1e-9)

    def read(self) -> dict[str, float]:
        """The figures, and start anew."""
        elapsed = self.elapsed()
        figures = {
            "samples_per_second": self._samples / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self._reset()
        return figures
