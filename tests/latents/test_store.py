import json
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable
from small_store import AUTOENCODER, CLIP, T5, sample_row, small_store

from ldm_core.errors import BadMedia, UserError
from ldm_core.files import read_json
from ldm_core.latents import store as store_module
from ldm_core.latents.describe import describe
from ldm_core.latents.ledger import compare, cut, shard_name
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import (
    SAMPLES,
    TABLES,
    caption_digest,
    content_digest,
    decode_array,
    encode_array,
)
from ldm_core.latents.statistics import channel_statistics
from ldm_core.latents.store import LatentStore, StoreVersion


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return small_store(tmp_path / "a store")


def samples(*ids: str) -> pa.Table:
    rows = [sample_row(id, torch.ones(2, 3, 3), torch.zeros(2, 3, 3), ("a",)) for id in ids]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def add(store: LatentStore, shard: str, *ids: str, version: int = 1) -> None:
    store.commit("samples", [store.write_part("samples", samples(*ids), shard)], shard, version)


def ids_of(store: LatentStore, version: int | None = None) -> list[str]:
    return sorted(store.table("samples", version, ["id"])["id"].to_pylist())


class TestCodec:
    def test_round_trip_is_that_of_16_bits(self):
        values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 100
        back = decode_array(encode_array(values), (3, 4, 5))
        np.testing.assert_array_equal(back, values.numpy().astype(np.float16))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -7e4])
    def test_what_16_bits_cannot_hold_is_a_reject(self, value):
        with pytest.raises(BadMedia) as caught:
            encode_array(torch.tensor([0.0, value]))
        assert caught.value.reason == "non-finite latent"

    def test_the_last_finite_value_passes(self):
        assert decode_array(encode_array(torch.tensor([65504.0])), (1,))[0] == 65504

    def test_content_digest_is_of_the_set(self):
        digests = [caption_digest(str(i)) for i in range(20)]
        assert content_digest(digests, ["e"]) == content_digest(digests[::-1], ["e"])
        assert content_digest(digests, ["e"]) != content_digest(digests[1:], ["e"])
        assert content_digest(digests, ["e"]) != content_digest([*digests, digests[0]], ["e"])
        assert content_digest(digests, ["e"]) != content_digest(digests, ["f"])

    def test_no_type_that_delta_lacks(self):
        def leaves(kind: pa.DataType):
            inner = [kind.field(i).type for i in range(kind.num_fields)]
            return [leaf for one in inner for leaf in leaves(one)] if inner else [kind]

        kinds = {leaf for schema in TABLES.values() for f in schema for leaf in leaves(f.type)}
        numbers = {pa.int32(), pa.int64(), pa.float32(), pa.float64()}
        assert kinds <= numbers | {pa.string(), pa.binary()}


class TestTables:
    def test_rows_come_back_as_written_whatever_the_tool(self, version):
        uri = f"{version.store.uri}/samples"
        ours = version.table("samples").sort_by("id")
        assert ours.schema.equals(SAMPLES)
        assert ours["id"].to_pylist() == [f"{i:03d}.png" for i in range(12)]
        for other in (
            DeltaTable(uri).to_pandas(),
            pd.concat(map(pd.read_parquet, Path(uri).glob("*.parquet"))),
            pa.concat_tables(map(pq.read_table, Path(uri).glob("*.parquet"))).to_pandas(),
        ):
            other = other.sort_values("id")
            assert other["latent_mean"].tolist() == ours["latent_mean"].to_pylist()
            assert other["captions"].iloc[1][0]["caption"] == "a red cat"

    def test_a_part_is_invisible_until_committed(self, tmp_path):
        store = LatentStore(str(tmp_path))
        store.create()
        part = store.write_part("samples", samples("a", "b"), "s")
        assert ids_of(store) == []
        store.commit("samples", [part], "s")
        assert ids_of(store) == ["a", "b"]

    def test_create_again_keeps_the_rows(self, version):
        version.store.create()
        assert len(ids_of(version.store)) == 12

    def test_a_schema_of_ones_own_is_refused_before_anything_is_written(self, tmp_path):
        store = LatentStore(str(tmp_path))
        store.create()
        wrong = samples("a").set_column(0, "id", pa.array([1], pa.uint8()))
        with pytest.raises(AssertionError):
            store.write_part("samples", wrong, "s")
        assert not list(tmp_path.glob("samples/*.parquet"))

    def test_delete_spares_the_published_version(self, version):
        store = version.store
        delete_rows(store, "samples", pa.table({"id": ["001.png", "007.png", "unknown"]}))
        assert len(ids_of(store)) == 10
        assert version.table("samples").num_rows == 12
        delete_rows(
            store, "texts", pa.table({"encoder": ["t5"], "caption_digest": [caption_digest("")]})
        )
        assert store.table("texts").num_rows == version.table("texts").num_rows - 1

    def test_a_shard_can_come_back_after_it_was_deleted(self, tmp_path):
        store = LatentStore(str(tmp_path))
        store.create()
        add(store, "s", "a", "b")
        delete_rows(store, "samples", pa.table({"id": ["a", "b"]}))
        seen = store.open("samples").transaction_version("s")
        assert seen == 1
        add(store, "s", "a", "b", version=seen + 1)
        assert ids_of(store) == ["a", "b"]

    def test_the_log_never_forgets_what_a_version_pins(self, version):
        settings = version.store.open("samples").metadata().configuration
        assert settings["delta.logRetentionDuration"] == "interval 5200 weeks"
        assert settings["delta.deletedFileRetentionDuration"] == "interval 5200 weeks"


class TestVersions:
    def test_a_version_says_what_it_holds(self, version):
        manifest = version.manifest
        assert (version.number, manifest.number) == (1, 1)
        assert manifest.counts == {"samples": 12, "texts": 8, "rejects": 0}
        assert (manifest.buckets, manifest.channels) == ({"3x3x1": 12}, 2)
        latents = np.stack(
            [
                decode_array(row["latent_mean"], row["latent_shape"])
                for row in version.table("samples").to_pylist()
            ]
        ).astype(np.float64)
        np.testing.assert_allclose(manifest.statistics.mean, latents.mean((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(manifest.statistics.std, latents.std((0, 2, 3)), rtol=1e-9)

    def test_an_old_version_stays_what_it_was(self, version):
        store = version.store
        add(store, "more", "z.png")
        store.publish(describe(store, AUTOENCODER, (T5, CLIP), 128, 1, None))
        assert store.versions() == [1, 2]
        assert store.open_version().manifest.counts["samples"] == 13
        assert store.open_version(1).table("samples").num_rows == 12
        assert store.open_version(1).manifest == version.manifest

    def test_nothing_published(self, tmp_path):
        with pytest.raises(UserError, match=rf"{tmp_path}/none .*`ldm encode`"):
            LatentStore(f"{tmp_path}/none").open_version()

    def test_no_such_version(self, version):
        with pytest.raises(UserError, match=r"no version 7, only \[1\]"):
            version.store.open_version(7)

    def test_a_content_is_found_whatever_its_number(self, version):
        store, content = version.store, version.manifest.content
        other = version.manifest.model_copy(update={"content": "another"})
        store.publish(other)
        assert store.version_of(content[:16]).number == 1
        store.publish(version.manifest)
        assert store.version_of(content[:16]).number == 3  # the newest of those that say the same
        assert store.version_of("another").number == 2
        with pytest.raises(
            UserError, match=r"no version of the content 0123 .* \[1, 2, 3\].*train"
        ):
            store.version_of("0123")

    def test_a_later_format_is_refused(self, version):
        path = Path(version.store.uri, "versions", "00000002.json")
        path.write_text(json.dumps({**version.manifest.model_dump(), "format": 9, "new": 1}))
        with pytest.raises(UserError, match=r"format 9.*reads 3"):
            version.store.open_version()

    def test_racing_publishers_never_share_a_number(self, version):
        store, numbers = version.store, []
        gate = threading.Barrier(8)

        def publisher() -> None:
            gate.wait()
            for _ in range(5):
                numbers.append(store.publish(version.manifest))

        threads = [threading.Thread(target=publisher) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(numbers) == list(range(2, 42))
        assert store.versions() == list(range(1, 42))
        marks = {store.open_version(number).manifest.publication for number in store.versions()}
        assert len(marks) == 41
        assert [p for p in Path(store.uri, "versions").iterdir() if p.suffix != ".json"] == []

    def test_a_reader_never_sees_half_a_manifest(self, version):
        store, stop = version.store, threading.Event()
        failures: list[Exception] = []

        def reader() -> None:
            while not stop.is_set():
                try:
                    store.open_version()
                except Exception as error:
                    failures.append(error)

        thread = threading.Thread(target=reader)
        thread.start()
        for _ in range(50):
            store.publish(version.manifest)
        stop.set()
        thread.join()
        assert failures == []

    def test_a_publication_acknowledged_late_is_not_repeated(self, version, monkeypatch):
        put = store_module.put_if_absent

        def late(uri: str, data: bytes) -> None:
            put(uri, data)
            raise FileExistsError(uri)  # what the storage library's own retry then meets

        monkeypatch.setattr(store_module, "put_if_absent", late)
        assert version.store.publish(version.manifest) == 2
        assert version.store.versions() == [1, 2]

    def test_manifest_on_disk_is_plain_json(self, version):
        written = read_json(f"{version.store.uri}/versions/00000001.json")
        assert written["counts"]["samples"] == 12


class TestLedger:
    def test_new_changed_gone_doubled_and_kept(self):
        wanted = {"new": "1", "changed": "2", "kept": "3", "twice": "4"}
        stored = [("changed", "x"), ("kept", "3"), ("gone", "5"), ("twice", "4"), ("twice", "4")]
        difference = compare(wanted, stored)
        assert difference.missing == ["changed", "new", "twice"]
        assert difference.stale == ["changed", "gone", "twice"]
        assert difference.kept == 1

    def test_what_a_killed_job_left_is_cut_as_it_would_have_cut_it(self):
        ids = [f"{i:03d}" for i in range(95)]
        shards = cut(ids, 10)
        done = {3, 0, 9}  # the short last one too
        left = [id for k, shard in enumerate(shards) if k not in done for id in shard]
        names = {shard_name(shard) for shard in shards}
        assert {shard_name(shard) for shard in cut(left, 10)} < names


class TestStatistics:
    def test_the_spread_of_the_posterior_counts(self):
        rng = np.random.default_rng(0)
        mean = rng.normal([1.0, -2.0], [0.5, 3.0], (400, 2)).reshape(400, 2, 1, 1)
        logvar = np.full_like(mean, np.log(0.25))
        measured = channel_statistics([(mean[:100], logvar[:100]), (mean[100:], logvar[100:])])
        expected = np.sqrt(mean.var((0, 2, 3)) + 0.25)
        np.testing.assert_allclose(measured.std, expected, rtol=1e-12)
        np.testing.assert_allclose(measured.mean, mean.mean((0, 2, 3)), rtol=1e-12)

    def test_the_order_of_the_rows_changes_no_bit(self):
        rng = np.random.default_rng(1)
        rows = [(m[None], m[None] - 3) for m in rng.normal(size=(60, 2, 3, 3))]
        assert channel_statistics(rows) == channel_statistics(rows[::-1])

    def test_a_constant_channel_does_not_divide_by_zero(self):
        constant = np.ones((4, 1, 2, 2))
        assert channel_statistics([(constant, np.full_like(constant, -60))]).std[0] > 0


def test_a_file_that_is_gone_is_told_with_what_names_them_all(version):
    next(Path(version.store.uri, "samples").glob("*.parquet")).unlink()
    with pytest.raises(UserError, match=r"table samples of .* is gone.*`ldm store .* --verify`"):
        version.table("samples")
