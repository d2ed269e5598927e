import numpy as np
import pytest

from ldm_core.reading.mixture import Mixture, Units
from ldm_core.reading.windows import LaneWindows

COUNTS = [8, 8, 3, 8, 1, 8, 30, 8, 8]


def pieces(weight: float = 1):
    number = np.arange(len(COUNTS), dtype=np.int32)
    return Mixture([{"b": Units(number, np.array(COUNTS, np.int32))}], [weight], 0).pieces("b", 0)


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
@pytest.mark.parametrize(("low", "high"), [(0, 82), (0, 20), (20, 41), (81, 82)])
def test_windows_are_whole_pieces_but_at_the_lanes_ends(size, low, high):
    found, order = LaneWindows(pieces(), low, high, size), pieces()
    assert (found.edges[0], found.edges[-1]) == (low, high)
    assert set(found.edges[1:-1].tolist()) <= set(order.starts.tolist())
    units = []
    for window in range(len(found)):
        parts = found.parts(window)
        assert [part.offset for part in parts] == np.cumsum(
            [0, *(part.count for part in parts)]
        ).tolist()[:-1]
        assert sum(part.count for part in parts) == found.samples(window) > 0
        assert found.samples(window) - parts[-1].count < size  # all begin within it
        units += [part.unit for part in parts]
    assert len(units) == len(set(units))  # each row group for one window


def test_a_span_may_have_parts_of_several_windows():
    found = LaneWindows(pieces(), 10, 70, 10)
    for start in range(0, 60, 7):
        end = min(start + 25, 60)
        spans = list(found.spans(start, end))
        told = [
            int(found.edges[window]) + k - 10
            for window, begin, until in spans
            for k in range(begin, until)
        ]
        assert told == list(range(start, end))


def test_a_cut_unit_is_shared_without_a_row_twice():
    order = pieces()
    large = int(np.argmax(np.diff(order.starts)))
    middle = int(order.starts[large]) + 11
    left, right = LaneWindows(order, 0, middle, 1000), LaneWindows(order, middle, 82, 1000)
    (one,) = (part for part in left.parts(0) if part.unit == order.unit[large])
    (other,) = (part for part in right.parts(0) if part.unit == order.unit[large])
    assert (one.first, one.count, other.first, other.count) == (0, 11, 11, 19)
