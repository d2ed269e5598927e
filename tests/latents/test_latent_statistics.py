"""Sums over rows that come in any order and in any pieces: the statistics and what is told of 8
bits."""

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from small_store import AUTOENCODER, CLIP, T5, small_store

from ldm_core.errors import UserError
from ldm_core.latents.describe import describe
from ldm_core.latents.manifest import LatentStatistics, Manifest
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


@pytest.mark.parametrize("logvar", [101.0, 800.0, math.inf, math.nan])
def test_a_spread_beyond_all_numbers_is_refused(logvar):
    latents = np.zeros((1, 2, 3, 3))
    with pytest.raises(UserError, match=f"log-variance of {logvar:g}, beyond 100"):
        channel_statistics([(latents, latents), (latents, latents + logvar)])


def test_manifests_of_two_machines_say_the_same(tmp_path):
    manifest = small_store(tmp_path).manifest
    for factor, same in ((1 + 1e-9, True), (1.001, False)):
        std = tuple(factor * value for value in manifest.statistics.std)
        statistics = LatentStatistics(mean=manifest.statistics.mean, std=std)
        other = manifest.model_copy(update={"statistics": statistics, "number": 7})
        assert manifest.says_the_same(other) == same
    fewer = LatentStatistics(mean=(0.0,), std=(1.0,))
    assert not manifest.says_the_same(manifest.model_copy(update={"statistics": fewer}))


def test_what_was_chosen_comes_back_as_it_was(tmp_path):
    chosen = {"flip": True, "tile": 1, "precision": "bf16"}
    manifest = small_store(tmp_path).manifest.model_copy(update={"encoding": chosen})
    read = Manifest.model_validate_json(manifest.model_dump_json())
    assert {key: (type(value), value) for key, value in read.encoding.items()} == {
        key: (type(value), value) for key, value in chosen.items()
    }


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
