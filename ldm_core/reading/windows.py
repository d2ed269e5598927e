"""A lane's stretch of a bucket in windows: read in the order of the pieces, shuffled in each.

A window is some whole pieces, those that begin within so many samples, so that no row group is
read for two windows. The rows of a unit have an order of their own in each pass, so that a piece
that an epoch or a lane cuts off is a random part of its unit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ldm_core.reading.mixture import Pieces


@dataclass(frozen=True)
class Part:
    """What a window has of one unit: `count` rows from `first` on in the order of a pass.

    Attributes:
        offset: samples of the window before it.
    """

    source: int
    unit: int
    turn: int
    first: int
    count: int
    offset: int


class LaneWindows:
    """The windows of a lane, bucket and epoch.

    Attributes:
        edges: (W + 1,) int64, where each window begins among the bucket's samples of the epoch, and
            where the last one ends.
    """

    def __init__(self, pieces: Pieces, low: int, high: int, size: int) -> None:
        """Cut a stretch into windows.

        Args:
            pieces: of the bucket and epoch.
            low, high: the lane's samples among the pieces'.
            size: samples within which a window's pieces begin.
        """
        self._pieces = pieces
        first = np.searchsorted(pieces.starts, low, side="right") - 1
        last = np.searchsorted(pieces.starts, high, side="left")
        begins = np.maximum(pieces.starts[first:last], low)
        window = (begins - low) // size
        new = np.flatnonzero(np.diff(window, prepend=-1))
        self.edges = np.append(begins[new], high)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def samples(self, window: int) -> int:
        """Of a window."""
        return int(self.edges[window + 1] - self.edges[window])

    def spans(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The samples from start to end of the lane: window, and from where to where in it."""
        low = int(self.edges[0])
        start, end = low + start, low + end
        window = int(np.searchsorted(self.edges, start, side="right")) - 1
        while start < end:
            begin, until = map(int, self.edges[window : window + 2])
            yield window, start - begin, min(end, until) - begin
            start, window = until, window + 1

    def parts(self, window: int) -> list[Part]:
        """What a window is made of."""
        pieces = self._pieces
        low, high = map(int, self.edges[window : window + 2])
        first = int(np.searchsorted(pieces.starts, low, side="right")) - 1
        last = int(np.searchsorted(pieces.starts, high, side="left"))
        result = []
        for k in range(first, last):
            begin, end = int(pieces.starts[k]), int(pieces.starts[k + 1])
            start = max(begin, low)
            result.append(
                Part(
                    source=int(pieces.source[k]),
                    unit=int(pieces.unit[k]),
                    turn=int(pieces.turn[k]),
                    first=int(pieces.first[k]) + start - begin,
                    count=min(end, high) - start,
                    offset=start - low,
                )
            )
        return result
