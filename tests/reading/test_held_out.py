import numpy as np
import pytest
import torch
from bucket_store import CLIP_OF_5, SHAPES, SQUARE, WIDE, add, add_files, bucket_store, publish
from small_store import sample_row
from small_streams import COUNTS, TOTAL, epoch_ids, ids_of, tokens

from ldm_core.errors import UserError
from ldm_core.latents.compact import compact
from ldm_core.latents.store import LatentStore
from ldm_core.reading import held_out
from ldm_core.reading.held_out import hold_out, leave_out, sources_of
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
    for seed in range(8):
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


def sample_row_of(rng, k, source=None, part=0, parts=1, bucket=SQUARE):
    shape = SHAPES[bucket]
    mean = torch.from_numpy(rng.normal(size=shape)).float()
    id = f"{source}#{part}" if source else f"new-{k}"
    row = sample_row(id, mean, torch.full(shape, -1.0), ("a dog",))
    return row | {"bucket": bucket, "source_id": source or id, "part": part, "parts": parts}


def store_of_files(uri, sizes, group=5, rejected=0, prefix="file"):
    """Files of so many rows each, in two buckets, which lie scattered over the row groups."""
    version = bucket_store(uri, {}, captions=("a dog",))
    rng = np.random.default_rng(0)
    rows = [
        sample_row_of(rng, 0, f"{prefix}-{k:02d}", part, size + rejected, (SQUARE, WIDE)[part % 2])
        for k, size in enumerate(sizes)
        for part in range(size)
    ]
    for bucket in (SQUARE, WIDE):
        mine = [row for row in rows if row["bucket"] == bucket]
        rng.shuffle(mine)
        add_files(version.store, "samples", mine, group, bucket)
    return publish(version.store)


def source_ids(ids):
    return {id.partition("#")[0] for id in ids}


def files_of(index):
    return source_ids(first_epoch(index))


@pytest.fixture(scope="module")
def scattered(tmp_path_factory):
    sizes = [1, 2, 6, 1, 8, 3, 1, 1, 4, 2, 1, 1]
    return store_of_files(tmp_path_factory.mktemp("scattered") / "s", sizes)


@pytest.mark.parametrize("looked_at", [1, 2**16])  # some row groups, or all of them
@pytest.mark.parametrize("count", [1, 4, 12])
def test_all_rows_of_a_file_are_on_one_side(scattered, monkeypatch, count, looked_at):
    monkeypatch.setattr(held_out, "_LOOKED_AT", looked_at)
    index, ids = index_store(scattered), sorted(ids_of(scattered.store.uri))
    for seed in range(3):
        rest, held = hold_out(index, count, seed)
        mine, others = first_epoch(held), first_epoch(rest)
        assert not source_ids(mine) & source_ids(others)
        assert sorted(mine + others) == ids
        assert 1 <= len(mine) <= count
        if looked_at > 1:
            assert len(mine) == count  # there are files of one row to fill it up
        assert set(sources_of(held).to_pylist()) == source_ids(mine)


def test_a_file_that_lies_in_no_few_row_groups_is_found_in_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "_LOOKED_AT", 1)
    version = store_of_files(tmp_path / "s", [4] * 6, rejected=1)  # never all the rows it says
    rest, held = hold_out(index_store(version), 8, 0)
    assert len(files_of(held)) == 2
    assert len(first_epoch(held)) == 8
    assert not files_of(rest) & files_of(held)


def test_a_file_of_more_rows_than_are_wanted(tmp_path):
    version = store_of_files(tmp_path / "s", [6, 6, 6])
    _, held = hold_out(index_store(version), 2, 0)
    assert (len(files_of(held)), len(first_epoch(held))) == (1, 6)
    version = store_of_files(tmp_path / "t", [6])
    with pytest.raises(UserError, match="'file-00' has 6 of the 6 samples"):
        hold_out(index_store(version), 2, 0)


def test_what_is_held_out_of_one_store_is_left_out_of_another(tmp_path):
    version = store_of_files(tmp_path / "s", [2, 1, 3, 1, 4, 1])
    other = store_of_files(tmp_path / "t", [1, 5, 2, 2, 1, 1, 1, 3], group=3)
    _, held = hold_out(index_store(version), 4, 0)
    index = index_store(other)
    left = leave_out(index, sources_of(held))
    assert files_of(left) == files_of(index) - files_of(held)
    assert len(first_epoch(left)) < len(first_epoch(index))
    assert left.samples.digest != index.samples.digest
    strangers = index_store(store_of_files(tmp_path / "u", [2, 2], prefix="other"))
    assert leave_out(strangers, sources_of(held)) is strangers
    with pytest.raises(UserError, match=r"all files of .*train.mix"):
        leave_out(index_store(version), sources_of(index_store(version)))


@pytest.mark.parametrize("count", [0, TOTAL // 2 + 1])
def test_too_many_are_refused(version, count):
    with pytest.raises(UserError, match=f"{count} samples are to be held out of the {TOTAL}"):
        hold_out(index_store(version), count, 0)
