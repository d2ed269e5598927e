import pickle

import numpy as np
import pyarrow as pa
import pytest
from bucket_store import CLIP_OF_5, SQUARE, WIDE, add, bucket_store, publish

from ldm_core.errors import UserError
from ldm_core.latents.compact import compact
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import caption_digest
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.index import StoreIndex, index_store
from ldm_core.reading.row_groups import TableFiles
from ldm_core.reading.text_index import hash_of

COUNTS = {SQUARE: 21, WIDE: 10, CLIP_OF_5: 3}
MB = 2**20


def ids_by_unit(index: StoreIndex) -> list[tuple[str, list[str]]]:
    samples, found = index.samples, []
    for unit in range(len(samples.group)):
        place = samples.groups.place(int(samples.group[unit]))
        table = TableFiles(samples.groups.uri).read(place, ("id", "bucket"))
        ids = np.array(table["id"].to_pylist())[samples.rows(unit)].tolist()
        buckets = set(np.array(table["bucket"].to_pylist())[samples.rows(unit)].tolist())
        assert buckets == {samples.buckets[int(samples.bucket[unit])]}
        assert len(ids) == samples.count[unit]
        found.append((buckets.pop(), ids))
    return found


def all_ids(index: StoreIndex) -> list[str]:
    return sorted(id for _, ids in ids_by_unit(index) for id in ids)


@pytest.fixture
def version(tmp_path) -> StoreVersion:
    return bucket_store(tmp_path / "a store", COUNTS)


class TestUnits:
    def test_a_file_is_a_unit_of_one_bucket(self, version):
        index = index_store(version)
        assert [bucket for bucket, _ in ids_by_unit(index)] == [WIDE] * 2 + [SQUARE] * 3 + [
            CLIP_OF_5
        ]
        assert index.samples.buckets == (WIDE, SQUARE, CLIP_OF_5)
        assert not index.samples.mixed
        assert index.samples.shapes == {WIDE: (2, 2, 6), SQUARE: (2, 4, 4), CLIP_OF_5: (2, 2, 4, 4)}
        assert all_ids(index) == sorted(version.table("samples")["id"].to_pylist())

    def test_the_order_is_that_of_the_content_not_of_the_files_names(self, version, tmp_path):
        again = bucket_store(tmp_path / "again", dict(reversed(COUNTS.items())))
        one, other = index_store(version), index_store(again)
        assert one.samples.groups.paths.tolist() != other.samples.groups.paths.tolist()
        assert ids_by_unit(one) == ids_by_unit(other)
        assert one.samples.digest == other.samples.digest
        bigger = bucket_store(tmp_path / "bigger", COUNTS | {WIDE: 11})
        assert index_store(bigger).samples.digest != one.samples.digest

    def test_a_compaction_mixes_buckets_in_a_row_group(self, version):
        store = version.store
        compact(store, "samples", MB)
        index = index_store(publish(store))
        assert len(index.samples.groups) == 1
        assert [bucket for bucket, _ in ids_by_unit(index)] == [WIDE, SQUARE, CLIP_OF_5]
        assert len(index.samples.mixed) == 3
        assert all_ids(index) == sorted(version.table("samples")["id"].to_pylist())

    def test_what_a_deletion_rewrote_has_other_types_and_short_statistics(self, tmp_path):
        long = "a path that is longer than parquet-rs' sixty-four bytes of statistics/" * 2
        version = bucket_store(tmp_path, COUNTS, prefix=long)
        gone = [f"{long}{SQUARE}-{k:04d}" for k in (0, 9, 20)]
        delete_rows(version.store, "samples", pa.table({"id": gone}))
        index = index_store(publish(version.store))
        expected = set(version.table("samples")["id"].to_pylist()) - set(gone)
        assert all_ids(index) == sorted(expected)
        firsts = [min(ids) for _, ids in ids_by_unit(index)]
        assert all(first.startswith(long) for first in firsts)

    def test_it_can_be_sent_to_a_worker_and_is_small(self, version):
        index = index_store(version)
        data = pickle.dumps(index)
        assert all_ids(pickle.loads(data)) == all_ids(index)
        assert len(data) < 8000

    def test_on_s3(self, s3, version):
        remote = index_store(bucket_store(f"{s3}/index/a store", COUNTS))
        assert ids_by_unit(remote) == ids_by_unit(index_store(version))
        assert remote.samples.digest == index_store(version).samples.digest


class TestTexts:
    def test_each_caption_is_found_by_both_encoders(self, version):
        texts = index_store(version).texts
        stored = version.table("texts").select(["caption_digest", "encoder"]).to_pylist()
        for name in ("t5", "clip"):
            digests = [row["caption_digest"] for row in stored if row["encoder"] == name]
            hashes = hash_of(pa.array(digests))
            assert hashes.tolist() == [int(digest[:16], 16) for digest in digests]
            groups, rows = texts.find(name, hashes)
            for digest, group, row in zip(digests, groups, rows, strict=True):
                table = TableFiles(texts.groups.uri).read(
                    texts.groups.place(int(group)), ("caption_digest", "encoder")
                )
                assert table.slice(int(row), 1).to_pylist() == [
                    {"caption_digest": digest, "encoder": name}
                ]

    def test_the_mean_size_is_that_of_16_bit_arrays(self, version):
        captions = ["", "a dog", "a red cat", "cat"]
        tokens = sum(len(text.split()) + 1 for text in captions)
        assert index_store(version).texts.mean_bytes == (2 * 5 * tokens + 4 * 2 * 3) / 4

    def test_a_missing_caption_is_named(self, version):
        digest = caption_digest("nobody embedded this")
        with pytest.raises(UserError, match=f"by t5 .*{digest[:16]}"):
            index_store(version).texts.find("t5", hash_of(pa.array([digest])))

    def test_a_caption_twice_is_refused(self, version):
        rows = version.table("texts").to_pylist()
        add(version.store, "texts", rows[:1], "again")
        with pytest.raises(UserError, match="there twice"):
            index_store(publish(version.store))


def test_a_version_without_samples_is_refused(tmp_path):
    version = bucket_store(tmp_path, {SQUARE: 2})
    ids = version.table("samples").select(["id"])
    delete_rows(version.store, "samples", ids)
    tables = version.manifest.tables | {"samples": version.store.open("samples").version()}
    number = version.store.publish(version.manifest.model_copy(update={"tables": tables}))
    with pytest.raises(UserError, match=f"version {number} has no sample"):
        index_store(version.store.open_version(number))
