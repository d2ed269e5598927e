"""Sums over rows that come in any order and in any pieces: the statistics and what is told of 8
bits."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from small_store import AUTOENCODER, CLIP, T5, small_store

from ldm_core.latents.describe import describe
from ldm_core.latents.rounding import RoundingErrors
from ldm_core.latents.statistics import ChannelMoments, channel_statistics, exact_sum


def rows_of_all_sizes(count: int = 60) -> list[tuple[np.ndarray, np.ndarray]]:
    """Posteriors whose sums round differently in every order."""
    rng = np.random.default_rng(2)
    scales = 10.0 ** rng.integers(-3, 4, count)
    latents = rng.normal(size=(count, 1, 3, 5, 5))
    return [(scale * mean, mean) for scale, mean in zip(scales, latents, strict=True)]


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_pieces_change_no_bit(size):
    rows, moments = rows_of_all_sizes(), ChannelMoments()
    for start in range(0, len(rows), size):
        moments.add(rows[start : start + size])
    assert moments.result() == channel_statistics(rows[::-1])


def test_nothing_has_no_statistics():
    moments = ChannelMoments()
    moments.add([])
    assert moments.result() is None


def test_an_exact_sum_is_that_of_fractions():
    rng = np.random.default_rng(3)
    values = (rng.normal(size=300) * 10.0 ** rng.integers(-20, 20, 300)).tolist()
    parts = exact_sum(values)
    assert sum(map(Fraction, parts)) == sum(map(Fraction, values))
    assert len(parts) < 10
    assert exact_sum([]) == exact_sum([1.5, -1.5]) == [0.0]
    assert exact_sum([math.inf, 1.0]) == [math.inf]


def test_rounding_errors_of_any_order():
    errors = np.random.default_rng(4).uniform(0, 0.01, 50).tolist()
    one, other = RoundingErrors(), RoundingErrors()
    one.add("t5", [*errors, None])
    for error in reversed(errors):
        other.add("t5", [error])
    other.add("clip", [None, None])
    assert one.result() == other.result()
    found = one.result()["t5"]
    assert (found.captions, found.largest) == (50, max(errors))
    assert found.mean == math.fsum(errors) / 50


def test_describing_holds_a_piece_of_the_latents(tmp_path, monkeypatch):
    version = small_store(tmp_path, count=640, parts=20, shape=(3, 64, 64))
    add, held = ChannelMoments.add, list[int]()

    def watched(self, posteriors):
        held.append(pa.total_allocated_bytes() - before)
        add(self, posteriors)

    monkeypatch.setattr(ChannelMoments, "add", watched)
    before = pa.total_allocated_bytes()
    again = describe(version.store, AUTOENCODER, (T5, CLIP), 128, 1, None)
    assert again.says_the_same(version.manifest)
    all_latents = 640 * 2 * 2 * 3 * 64 * 64  # bytes
    assert max(held) < all_latents / 4
