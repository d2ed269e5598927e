"""Parquet row groups that cannot be read: what becomes of their rows, and at what cost."""

import errno
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_encode_media import encoded, project
from test_encode_reads import group_reads, png  # noqa: F401

from ldm_core.errors import UserError
from ldm_core.media import locators
from ldm_core.media.buckets import Geometry
from ldm_core.media.locators import DamagedRowGroup, MediaReader, cell_uri
from ldm_core.media.parts import ClipRule
from pipelines.encode_files import READS_IN_FLIGHT, readable, with_content
from pipelines.encode_media import probe_entries
from pipelines.encode_plan import Item, Job, as_they_lie, describe_autoencoder, make_plan
from pipelines.recipes.schema import Recipe

GROUPS, ROWS = 3, 8
JOB = Job("", Geometry(64, 8), ClipRule(8, 8, None, 1, False), 1, "", "", "", 8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    count = GROUPS * ROWS
    columns = {"image": [png(k) for k in range(count)], "caption": ["a"] * count}
    file = tmp_path / "data/all.parquet"
    written: dict = {"row_group_size": ROWS, "use_dictionary": False, "compression": "none"}
    written |= {"write_statistics": False}  # else a page begins with them
    pq.write_table(pa.table(columns), file, **written)
    return file


@pytest.fixture
def recipe(file: Path, tmp_path: Path) -> Recipe:
    recipe = project(tmp_path, 16, upscale=True, shard_size=100)
    return recipe.model_copy(update={"data": str(file)})


def damage(file: Path, group: int, at: int, count: int) -> None:
    """Overwrite bytes of a row group's pictures; the footer and the captions stay."""
    column = pq.read_metadata(file).row_group(group).column(0)
    assert column.path_in_schema == "image"
    place = column.data_page_offset + at
    with file.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"\xff" * count)


@pytest.mark.parametrize(
    ("at", "said"),
    [(0, "OSError: Couldn't deserialize thrift"), (32, "ArrowInvalid: Invalid or truncated")],
    ids=["header of the page", "length of the first value"],
)
def test_rows_of_a_damaged_row_group_are_rejects(recipe, file, at, said):
    damage(file, 1, at, 16)
    version = encoded(recipe)
    rejects = version.table("rejects").to_pylist()
    of_group = {f"all.parquet/{k}" for k in range(ROWS, 2 * ROWS)}
    assert {row["id"] for row in rejects} == of_group
    assert {(row["stage"], row["reason"]) for row in rejects} == {("read", "damaged row group")}
    assert all(f"row group 1: {said}" in row["detail"] for row in rejects)
    assert version.manifest.counts["samples"] == (GROUPS - 1) * ROWS


def test_a_group_with_less_rows_than_its_footer_tells_is_damage(file, monkeypatch):
    short = lambda self, *_, **__: pa.table({"image": [b"1"] * (ROWS - 1)})  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", short)
    with pytest.raises(DamagedRowGroup, match=f"has {ROWS - 1} of its {ROWS} rows"):
        MediaReader().read(cell_uri(str(file), 1, ROWS - 1, "image"))


@pytest.mark.parametrize(
    ("group", "row", "column"), [(GROUPS, 0, "image"), (0, ROWS, "image"), (0, 0, "picture")]
)
def test_what_is_not_there_has_changed(file, group, row, column):
    with pytest.raises(UserError, match="is not as it was listed"):
        MediaReader().read(cell_uri(str(file), group, row, column))


def test_errors_of_the_storage_pass_as_they_are(file, monkeypatch):
    def fails(self, *_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with pytest.raises(OSError, match="Input/output error") as caught:
        MediaReader().read(cell_uri(str(file), 0, 0, "image"))
    assert caught.value.errno == errno.EIO


def test_a_damaged_row_group_is_not_read_for_each_of_its_rows(recipe, file, group_reads):  # noqa: F811
    damage(file, 1, 0, 16)
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    entries = sorted(plan.entries.values(), key=as_they_lie)[ROWS:]
    found = json.loads(probe_entries({"items": json.dumps(entries)}, plan.job)["items"])
    assert [part.get("reason") for part in found] == ["damaged row group"] * ROWS + [None] * ROWS
    assert group_reads[1] <= 2
    assert group_reads[2] == 1
    assert group_reads[0] == 0  # who is asked whether the storage answers reads no row group


class TestOfAMoment:
    """Errors of the storage that have passed when others are asked."""

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.EIO, "Input/output error"),
            OSError(errno.ESTALE, "Stale file handle"),
            PermissionError(errno.EACCES, "Permission denied"),
        ],
        ids=lambda error: errno.errorcode[error.errno],
    )
    def test_a_file_is_read_once_more_before_it_is_a_reject(self, tmp_path, monkeypatch, error):
        items = put_files(tmp_path, 2 * READS_IN_FLIGHT)
        read, seen = MediaReader.read, Counter[str]()

        def away_at_first(self, uri: str) -> bytes:
            seen[uri] += 1
            if seen[uri] == 1 and len(seen) <= READS_IN_FLIGHT:
                raise error
            return read(self, uri)

        monkeypatch.setattr(MediaReader, "read", away_at_first)
        found = [content for _, content in with_content([[item] for item in items], JOB)]
        assert [readable(content) for content in found] == [b"%d" % k for k in range(len(items))]
        assert max(seen.values()) == 2

    def test_who_answers_no_more_at_the_second_time_is_no_bad_file(self, tmp_path, monkeypatch):
        errors = [OSError(errno.EIO, "Input/output error"), ConnectionResetError("gone")]

        def fails(self, uri: str) -> bytes:
            raise errors.pop(0)

        monkeypatch.setattr(MediaReader, "read", fails)
        items = put_files(tmp_path, 2)
        with pytest.raises(ConnectionResetError):
            list(with_content([items[:1]], replace(JOB, witnesses=(items[1]["uri"],))))

    def test_a_row_group_is_read_once_more(self, file, monkeypatch, group_reads):  # noqa: F811
        counted = locators._read_column

        def away_at_first(place: str, row_group: int, column: str) -> pa.ChunkedArray:
            found = counted(place, row_group, column)
            if group_reads[row_group] == 1:
                raise OSError(errno.EIO, "Input/output error")
            return found

        monkeypatch.setattr(locators, "_read_column", away_at_first)
        files = [[item_of(cell_uri(str(file), 1, row, "image"))] for row in range(ROWS)]
        found = [readable(content) for _, content in with_content(files, JOB)]
        assert found == [png(ROWS + row) for row in range(ROWS)]
        assert group_reads == {1: 2}


def put_files(folder: Path, count: int) -> list[Item]:
    """Files of a few bytes each."""
    for k in range(count):
        (folder / f"{k}.png").write_bytes(b"%d" % k)
    return [item_of(str(folder / f"{k}.png")) for k in range(count)]


def item_of(uri: str) -> Item:
    return {"id": uri, "uri": uri, "kind": "image", "size": None, "fingerprint": "f"}
