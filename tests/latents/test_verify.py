"""A sound store holds; files that are damaged for real are named."""

import io
import json
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_faults import FACTS, change_manifest, data_files, failures, only, sound_store

from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import StoreVersion
from ldm_core.latents.verify import verify


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    return sound_store(tmp_path / "a store")


class TestSound:
    def test_every_rule_is_asked_of_everything(self, version):
        checks = verify(version, FACTS)
        assert [check for check in checks if check.failed or not check.checked] == []
        counts = {check.rule: check.checked for check in checks}
        assert counts["files are there, whole and readable"] == 5
        assert counts["latents are finite"] == 12
        assert counts["embeddings are finite"] == 8
        assert counts["an id has one row, in samples or in rejects"] == 14
        assert counts["channel statistics are the manifest's"] == 6

    def test_progress_counts_every_row(self, version):
        seen: list[int] = []
        verify(version, None, seen.append)
        assert seen[-1] == sum(version.manifest.counts.values())
        assert seen == sorted(seen)

    def test_an_old_version_holds_when_the_tables_have_moved_on(self, version):
        store = version.store
        delete_rows(store, "samples", pa.table({"id": ["001.png", "005.png"]}))
        delete_rows(store, "texts", pa.table({"encoder": ["t5"]}))
        assert failures(version) == {}

    def test_files_that_a_deletion_rewrote_have_the_schema(self, version):
        store = version.store
        delete_rows(store, "rejects", pa.table({"id": ["a.txt"]}))
        tables = version.manifest.tables | {"rejects": store.open("rejects").version()}
        changed = change_manifest(version, tables=tables)
        (check,) = only(failures(changed), "counts")
        assert check.first[0].startswith("counts rejects: 1, ")

    def test_memory_does_not_grow_with_the_store(self, tmp_path):
        version = sound_store(tmp_path, count=640, parts=20, shape=(3, 64, 64))
        taken: list[int] = []
        before = pa.total_allocated_bytes()
        verify(version, None, lambda _: taken.append(pa.total_allocated_bytes() - before))
        assert version.manifest.bytes > 14e6
        assert max(taken) < 4e6

    def test_on_s3(self, s3):
        version = sound_store(f"{s3}/verify/a store")
        assert failures(version) == {}
        fsspec.filesystem("s3").rm(data_path(version))
        (check,) = (c for rule, c in failures(version).items() if "files are there" in rule)
        assert check.first[0].endswith("it is missing")


def data_path(version: StoreVersion) -> str:
    log = version.store.open("samples", version.manifest.tables["samples"])
    name = pa.table(log.get_add_actions())["path"].to_pylist()[0]
    return f"{version.store.uri}/samples/{name}"


class TestFiles:
    @pytest.mark.parametrize("table", ["samples", "texts", "rejects"])
    def test_a_missing_one_is_named(self, version, table):
        file = data_files(version, table)[0]
        file.unlink()
        found = failures(version)
        (check,) = (check for rule, check in found.items() if "files are there" in rule)
        assert check.first == (f"{table}/{file.name}: it is missing",)
        assert any(rule.startswith("counts") for rule in found)  # and its rows are too few

    def test_one_cut_short_is_named(self, version):
        file = data_files(version, "samples")[0]
        size = file.stat().st_size
        file.write_bytes(file.read_bytes()[:-1])
        (check,) = (c for rule, c in failures(version).items() if "files are there" in rule)
        assert check.first == (f"samples/{file.name}: {size - 1} bytes, not {size}",)

    def test_one_that_is_no_parquet_is_named_and_the_others_are_read(self, version):
        first, *others = data_files(version, "samples")
        first.write_bytes(b"x" * first.stat().st_size)
        checks = {check.rule: check for check in verify(version, FACTS)}
        check = checks["files are there, whole and readable"]
        assert (check.failed, check.first[0].split(":")[0]) == (1, f"samples/{first.name}")
        assert checks["latents are finite"].checked == 4 * len(others)

    def test_a_log_that_is_gone_is_named(self, version):
        for file in Path(version.store.uri, "texts", "_delta_log").iterdir():
            file.unlink()
        (check,) = (c for rule, c in failures(version).items() if "files are there" in rule)
        assert check.first[0].startswith("texts at its version 1: ")

    def test_other_columns_are_named(self, version):
        def as_float(schema: pa.Schema) -> pa.Schema:
            place = schema.get_field_index("width")
            return schema.remove(0).set(place - 1, pa.field("width", pa.float64()))

        (file,) = data_files(version, "texts")
        for file in data_files(version, "samples")[:1]:
            sink = io.BytesIO()
            pq.write_table(as_float(TABLES["samples"]).empty_table(), sink)
            file.write_bytes(sink.getvalue())
        log = Path(version.store.uri, "samples", "_delta_log")
        old, new = data_files(version, "samples")[0].name, len(sink.getvalue())
        for commit in log.glob("*.json"):  # as a writer of its own would have committed it
            lines = commit.read_text().splitlines()
            kept = [line if old not in line else _resized(line, new) for line in lines]
            commit.write_text("\n".join(kept) + "\n")
        check = failures(version)["files have the schema's columns"]
        assert check.first[0].startswith(f"samples/{old}: no column id, width is DOUBLE (None)")

    def test_any_flipped_byte_is_survived_and_what_training_reads_is_guarded(self, version):
        """Bytes that no check needs may flip unseen: padding, statistics, another column's text."""
        rng = random.Random(0)
        seen = {"samples": 0, "texts": 0}
        for table in seen:
            file = data_files(version, table)[0]
            whole, rows = file.read_bytes(), read(version, table)
            for place in rng.sample(range(len(whole)), 40):
                flipped = whole[place] ^ rng.randrange(1, 256)
                file.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
                named = failures(version)
                seen[table] += bool(named)
                if table == "samples" and read(version, table) != rows:
                    assert named, f"byte {place}"
            file.write_bytes(whole)
        assert min(seen.values()) > 20


def _resized(line: str, size: int) -> str:
    action = json.loads(line)
    action["add"]["size"] = size
    return json.dumps(action)


def read(version: StoreVersion, table: str) -> object:
    """What training reads of the rows; None if nothing can be."""
    columns = ["id", "latent_mean", "latent_logvar", "latent_shape", "captions"]
    try:
        return version.table(table, columns if table == "samples" else None).to_pylist()
    except Exception:
        return None
