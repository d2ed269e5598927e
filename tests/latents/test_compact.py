"""Other files, the same rows, and a version of them."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from store_faults import Rows, add_rows, change_rows, data_files, reject, sound_store
from table_contents import holds, live, rows_of

from ldm_core.files import read_bytes
from ldm_core.latents import table_files
from ldm_core.latents.compact import compact, publish_compacted
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TABLES, encode_array
from ldm_core.latents.store import StoreVersion
from ldm_core.latents.table_files import ROWS_PER_GROUP

MB = 2**20


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return sound_store(tmp_path / "a store", count=40, parts=10)


class TestRows:
    def test_the_rows_are_the_same_in_one_commit(self, version):
        store = version.store
        before, at = rows_of(store, "samples"), store.open("samples").version()
        done = compact(store, "samples", MB)
        assert (done.files_before, done.files_after) == (10, 1)
        assert done.bytes_before == sum(
            file.stat().st_size for file in data_files(version, "samples")
        )
        assert done.bytes_after < done.bytes_before / 2
        assert store.open("samples").version() == at + 1
        assert rows_of(store, "samples") == before
        assert version.table("samples").sort_by("id") == before  # from the former files

    def test_files_of_any_writer_are_merged(self, version):
        """delta-rs' own deletion writes other Arrow types."""
        store = version.store
        store.open("samples").delete("id IN ('001.png', '012.png')")
        before = rows_of(store, "samples")
        assert "part-" in str(live(store)["path"])
        compact(store, "samples", MB)
        assert live(store).num_rows == 1
        assert rows_of(store, "samples") == before
        assert rows_of(store, "samples").schema == TABLES["samples"]

    def test_nulls_and_odd_texts_survive(self, version):
        store = version.store
        odd = [reject(id) for id in ("", "ä\0ö", "名前" * 500)]
        odd += [dict.fromkeys(TABLES["rejects"].names)]
        for place, row in enumerate(odd):
            add_rows(store, "rejects", [row], f"odd{place}")
        before = rows_of(store, "rejects")
        compact(store, "rejects", MB)
        assert live(store, "rejects").num_rows == 1
        assert rows_of(store, "rejects") == before

    def test_files_are_about_the_target_and_large_ones_are_left(self, tmp_path):
        store = sound_store(tmp_path, count=60, parts=30).store
        each = max(live(store)["size_bytes"].to_pylist())
        large = sound_store(tmp_path / "large", count=400, parts=1).store
        (file,) = data_files(large.open_version(), "samples")
        data = store.table("samples")
        target = 8 * each
        compact(store, "samples", target)
        sizes = live(store)["size_bytes"].to_pylist()
        assert len(sizes) < 8
        assert max(sizes) <= target
        assert store.table("samples").sort_by("id") == data.sort_by("id")
        compact(large, "samples", file.stat().st_size)
        assert data_files(large.open_version(), "samples") == [file]

    def test_again_there_is_nothing_to_do(self, version):
        store = version.store
        compact(store, "samples", MB)
        at, paths = store.open("samples").version(), live(store)["path"].to_pylist()
        done = compact(store, "samples", MB)
        assert (done.files_before, done.files_after) == (1, 1)
        assert (store.open("samples").version(), live(store)["path"].to_pylist()) == (at, paths)

    def test_row_groups_bound_what_a_reader_holds(self, version):
        store = version.store
        for shard in range(5):
            rows = [reject(f"{shard}-{k}") for k in range(ROWS_PER_GROUP // 2 + 7)]
            add_rows(store, "rejects", rows, f"many{shard}")
        compact(store, "rejects", 64 * MB)
        (path,) = live(store, "rejects")["path"].to_pylist()
        file = pq.ParquetFile(Path(store.uri, "rejects", path)).metadata
        groups = [file.row_group(k).num_rows for k in range(file.num_row_groups)]
        assert max(groups) <= ROWS_PER_GROUP
        assert len(groups) <= 5

    def test_so_they_do_in_bytes(self, version, monkeypatch):
        monkeypatch.setattr(table_files, "BYTES_PER_GROUP", 20_000)
        store = version.store
        compact(store, "samples", MB)
        (path,) = live(store)["path"].to_pylist()
        file = pq.ParquetFile(Path(store.uri, "samples", path))
        groups = [file.read_row_group(k).nbytes for k in range(file.metadata.num_row_groups)]
        assert len(groups) > 1
        assert max(groups) < 2 * 20_000

    def test_pages_have_checksums_so_that_a_flip_in_an_embedding_is_found(self, version):
        store = change_rows(version, "texts", widen).store
        kept = store.table("texts").to_pylist()
        delete_rows(store, "texts", pa.table({"caption": ["cat"]}))
        add_rows(store, "texts", [row for row in kept if row["caption"] == "cat"], "cat")
        compact(store, "texts", MB)
        compacted = store.open_version(publish_compacted(store))
        (file,) = data_files(compacted, "texts")
        whole, rng, noticed = file.read_bytes(), random.Random(0), 0
        rows = compacted.table("texts")
        start, length = column_chunk(file, "tokens")
        for place in rng.sample(range(start, start + length), 25):
            flipped = whole[place] ^ rng.randrange(1, 256)
            file.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
            if holds(compacted):  # it was in a page's header: its statistics, which nobody reads
                assert compacted.table("texts") == rows
            else:
                noticed += 1
        file.write_bytes(whole)
        assert holds(compacted)
        assert noticed > 6


def widen(rows: Rows) -> None:
    """Token embeddings that no compression can shorten."""
    random = torch.Generator().manual_seed(0)
    for row in rows:
        if row["tokens"] is not None:
            shape = [row["tokens_shape"][0], 300]
            row.update(
                tokens=encode_array(torch.randn(shape, generator=random)), tokens_shape=shape
            )


def column_chunk(file: Path, name: str) -> tuple[int, int]:
    """Where a column's pages begin in a file, and their bytes."""
    group = pq.ParquetFile(file).metadata.row_group(0)
    chunks = [group.column(k) for k in range(group.num_columns)]
    chunk = next(each for each in chunks if each.path_in_schema == name)
    return chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size


class TestPublishing:
    def test_a_version_of_the_same_content_with_a_card(self, version):
        store = version.store
        for table in TABLES:
            compact(store, table, MB)
        number = publish_compacted(store)
        newest = store.open_version()
        assert number == newest.number == version.number + 1
        assert newest.manifest.content == version.manifest.content
        assert newest.manifest.tables["samples"] == store.open("samples").version()
        assert newest.manifest.bytes < version.manifest.bytes
        assert holds(newest)
        assert holds(version)
        assert f"version {number} of".encode() in read_bytes(f"{store.uri}/README.md")

    def test_nothing_is_published_where_nothing_was_compacted(self, version):
        assert publish_compacted(version.store) == version.number
        assert version.store.open_version().number == version.number

    @pytest.mark.parametrize("table", ["samples", "texts", "rejects"])
    def test_rows_that_no_version_has_are_left_to_their_writer(self, version, table):
        store = version.store
        rows = store.table(table).to_pylist()
        add_rows(store, table, [rows[0]], "again")  # a row twice is another content as well
        compact(store, "samples", MB)
        assert publish_compacted(store) is None
        assert store.open_version().number == version.number

    def test_on_s3(self, s3):
        store = sound_store(f"{s3}/compact/a store").store
        before = rows_of(store, "samples")
        assert compact(store, "samples", MB).files_after == 1
        assert publish_compacted(store) == 3
        assert rows_of(store, "samples") == before
        assert holds(store.open_version())
