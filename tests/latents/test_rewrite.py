"""Rows are removed and changed in the files that hold them, and nowhere else."""

from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pytest
import torch
from small_store import sample_row, small_store

from ldm_core.latents import rewrite, table_files
from ldm_core.latents.compact import compact
from ldm_core.latents.rewrite import delete_rows, replace_rows
from ldm_core.latents.schema import SAMPLES, caption_digest, caption_rows
from ldm_core.latents.store import LatentStore


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    """Three files of four samples."""
    made = LatentStore(str(tmp_path / "a store"))
    made.create()
    for shard in "abc":
        rows = [
            sample_row(f"{shard}{k}", torch.full((2, 3, 3), float(k)), torch.zeros(2, 3, 3), ("x",))
            for k in range(4)
        ]
        part = made.write_part("samples", pa.Table.from_pylist(rows, schema=SAMPLES), shard)
        made.commit("samples", [part], shard)
    return made


def keys(*ids: str) -> pa.Table:
    return pa.table({"id": list(ids)})


def captions(**told: str) -> pa.Table:
    fields = [SAMPLES.field(name) for name in ("id", "captions", "captions_digest")]
    rows = [
        {"id": id, "captions": caption_rows([(caption, 1.0)]), "captions_digest": caption}
        for id, caption in told.items()
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(fields))


def shards(store: LatentStore) -> set[str]:
    """What the names of the live files begin with."""
    return {Path(file.path).name.split("-")[0] for file in table_files.live_files(opened(store))}


def opened(store: LatentStore):
    return store.open("samples")


class TestDeleting:
    def test_other_files_are_not_opened_for_more_than_their_keys(self, store):
        read = []

        def pieces(uri, table, paths):
            read.extend(paths)
            return table_files.read_pieces(uri, table, paths)

        with patch.object(rewrite, "read_pieces", pieces):
            delete_rows(store, "samples", keys("b1", "c0", "c1", "c2", "c3", "unknown"))
        assert [path[0] for path in read] == ["b"]  # all of c goes: why read it?
        assert shards(store) == {"a", "rewrite"}

    def test_the_others_stay_bit_for_bit_in_their_order(self, store):
        before = store.table("samples").to_pylist()
        delete_rows(store, "samples", keys("b1", "a3"))
        left = {row["id"]: row for row in store.table("samples").to_pylist()}
        assert left == {row["id"]: row for row in before if row["id"] not in ("b1", "a3")}
        assert [id for id in left if id[0] == "b"] == ["b0", "b2", "b3"]

    def test_what_nobody_has_makes_no_commit(self, store):
        at = opened(store).version()
        delete_rows(store, "samples", keys("unknown"))
        delete_rows(store, "samples", pa.table({}))
        assert opened(store).version() == at

    def test_all_columns_of_a_key_must_agree(self, tmp_path):
        store = small_store(tmp_path).store
        count, empty = store.table("texts").num_rows, caption_digest("")
        delete_rows(store, "texts", pa.table({"encoder": ["t5"], "caption_digest": [empty]}))
        left = store.table("texts")
        assert left.num_rows == count - 1
        pairs = list(
            zip(left["encoder"].to_pylist(), left["caption_digest"].to_pylist(), strict=True)
        )
        assert ("clip", empty) in pairs
        assert ("t5", empty) not in pairs

    def test_of_many_files_and_row_groups_those_rows_go(self, tmp_path, monkeypatch):
        monkeypatch.setattr(table_files, "ROWS_PER_GROUP", 3)
        store = small_store(tmp_path, count=90, parts=7).store
        compact(store, "samples", 20_000)
        gone = {f"{k:03d}.png" for k in range(0, 90, 4)}
        before = {row["id"]: row for row in store.table("samples").to_pylist()}
        delete_rows(store, "samples", keys(*sorted(gone)))
        after = {row["id"]: row for row in store.table("samples").to_pylist()}
        assert after == {id: row for id, row in before.items() if id not in gone}


class TestReplacing:
    def test_nested_columns_of_these_rows_and_of_no_others(self, store):
        before = {row["id"]: row for row in store.table("samples").to_pylist()}
        replace_rows(store, "samples", captions(a1="new", c2="other", unknown="none"))
        after = {row["id"]: row for row in store.table("samples").to_pylist()}
        for id, caption in {"a1": "new", "c2": "other"}.items():
            told = {"captions": caption_rows([(caption, 1.0)]), "captions_digest": caption}
            assert after[id] == before[id] | told
        assert {id: row for id, row in after.items() if id not in ("a1", "c2")} == {
            id: row for id, row in before.items() if id not in ("a1", "c2")
        }
        assert shards(store) == {"b", "rewrite"}


def test_a_commit_whose_acknowledgement_is_lost_is_made_once(store):
    commit, tries = table_files.replace_files, []

    def lost(*args) -> None:
        commit(*args)
        tries.append(1)
        raise OSError("no answer")

    with patch.object(rewrite, "replace_files", lost):
        replace_rows(store, "samples", captions(a1="new"))
    assert tries == [1]
    assert opened(store).version() == 4


def test_of_two_at_a_time_the_second_starts_anew(store):
    """Each removes a row of the same file: a file that both rewrite would bring rows back."""
    write, met = table_files.write_file, []

    def slow(*args):
        if not met:
            met.append(1)
            delete_rows(LatentStore(store.uri), "samples", keys("a0"))
        return write(*args)

    with patch.object(rewrite, "write_file", slow):
        delete_rows(store, "samples", keys("a1"))
    ids = sorted(store.table("samples", columns=["id"])["id"].to_pylist())
    assert ids == ["a2", "a3", *(f"{shard}{k}" for shard in "bc" for k in range(4))]


def test_on_s3(s3):
    store = small_store(f"{s3}/rewritten").store
    replace_rows(store, "samples", captions(**{"003.png": "new"}))
    delete_rows(store, "samples", keys("001.png", "007.png"))
    left = store.table("samples", columns=["id", "captions_digest"]).to_pylist()
    told = {row["id"]: row["captions_digest"] for row in left}
    assert sorted(told) == [f"{k:03d}.png" for k in range(12) if k not in (1, 7)]
    assert told["003.png"] == "new"
