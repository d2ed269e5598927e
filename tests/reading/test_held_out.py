import numpy as np
import pytest
import torch
from bucket_store import CLIP_OF_5, SQUARE, WIDE, add, bucket_store, publish
from small_store import sample_row
from test_stream import COUNTS, TOTAL, epoch_ids, ids_of, tokens

from ldm_core.errors import UserError
from ldm_core.latents.compact import compact
from ldm_core.latents.store import LatentStore
from ldm_core.reading.held_out import hold_out
from ldm_core.reading.index import StoreIndex, index_store
from ldm_core.reading.stream import StreamReader


def first_epoch(index: StoreIndex) -> list[str]:
    reader = StreamReader([index], seed=0, lanes=1, budget=64, tokens=tokens)
    return sorted(epoch_ids(reader, 0))


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    return bucket_store(tmp_path_factory.mktemp("store") / "s", COUNTS)


@pytest.mark.parametrize("count", [1, 10, TOTAL // 2])
def test_every_sample_is_on_one_side(version, count):
    rest, held = (first_epoch(index) for index in hold_out(index_store(version), count, 0))
    assert len(held) == count
    assert not set(rest) & set(held)
    assert sorted(rest + held) == sorted(ids_of(version.store.uri))


def test_all_buckets_may_be_held_out_or_one_may_vanish(tmp_path):
    version = bucket_store(tmp_path / "s", {SQUARE: 12, WIDE: 1, CLIP_OF_5: 1})
    for seed in range(40):
        rest, held = hold_out(index_store(version), 7, seed)
        assert sorted(first_epoch(rest) + first_epoch(held)) == sorted(ids_of(version.store.uri))
        for index in (rest, held):
            assert set(index.samples.shapes) == set(index.samples.buckets)


def test_the_choice_follows_the_seed_and_the_ids_not_the_files(tmp_path):
    version = bucket_store(tmp_path / "s", COUNTS)
    held = first_epoch(hold_out(index_store(version), 9, 0)[1])
    assert held != first_epoch(hold_out(index_store(version), 9, 1)[1])
    store = LatentStore(version.store.uri)
    compact(store, "samples", 2**20)
    compacted = index_store(publish(store))
    assert len(compacted.samples.groups) < len(index_store(version).samples.groups)
    assert first_epoch(hold_out(compacted, 9, 0)[1]) == held


def test_new_samples_move_few_of_them(tmp_path):
    version = bucket_store(tmp_path / "s", {SQUARE: 100})
    before = set(first_epoch(hold_out(index_store(version), 20, 0)[1]))
    rng = np.random.default_rng(1)
    rows = [sample_row_of(rng, k) for k in range(10)]
    add(version.store, "samples", rows, "more")
    after = set(first_epoch(hold_out(index_store(publish(version.store)), 20, 0)[1]))
    assert len(before & after) >= 14


def sample_row_of(rng, k):
    mean = torch.from_numpy(rng.normal(size=(2, 4, 4))).float()
    row = sample_row(f"new-{k}", mean, torch.full((2, 4, 4), -1.0), ("a dog",))
    return row | {"bucket": SQUARE}


@pytest.mark.parametrize("count", [0, TOTAL // 2 + 1])
def test_too_many_are_refused(version, count):
    with pytest.raises(UserError, match=f"{count} samples are to be held out of the {TOTAL}"):
        hold_out(index_store(version), count, 0)
