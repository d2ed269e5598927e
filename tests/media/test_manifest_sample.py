"""A part of manifests in place of all of their rows."""

import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import counted, fill, jsonl, png

from ldm_core.errors import UserError
from ldm_core.media import manifest_rows, manifest_sample
from ldm_core.media.places import find_place, stat_each, stat_files
from ldm_core.media.sources import list_media, look_at

ROWS = 60  # of each row group


def write(folder, name: str, groups: int) -> None:
    """Every row group begins with five pictures that are there; the others are missing."""
    files = [f"{g}-{k}.png" if k < 5 else "missing.png" for g in range(groups) for k in range(ROWS)]
    table = pa.table({"file": files, "caption": [f"caption {k}" for k in range(len(files))]})
    pq.write_table(table, folder / name, row_group_size=ROWS)


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path, {f"media/{g}-{k}.png": png(k) for g in range(80) for k in range(5)})
    return tmp_path / "media"


def test_rows_are_the_first_of_row_groups_that_are_spread_over_all(folder):
    write(folder, "all.parquet", 80)
    found = look_at(str(folder / "all.parquet"), most=128)
    assert (found.rows, found.total) == (4 * 32, 80 * ROWS)
    groups = sorted({int(entry.id.split("-")[0]) for entry in found.listing.entries})
    assert groups == [k * 80 // 32 for k in range(32)]
    assert len(found.listing.entries) == 128
    assert not found.listing.rejects
    whole = {entry.id: entry for entry in list_media(str(folder / "all.parquet")).entries}
    assert all(whole[entry.id] == entry for entry in found.listing.entries)


@pytest.mark.parametrize(
    ("numbers", "least", "most"),
    [
        (np.arange(4000), 4000, 4000),
        (np.arange(4000) % 10, 10, 10),
        (np.arange(4000) // 4, 1000, 1300),  # side by side
        (np.random.default_rng(0).permutation(4000) // 4, 1000, 3200),
    ],
    ids=["no two alike", "ten, again and again", "four of each", "four of each, shuffled"],
)
def test_how_many_captions_all_rows_have_at_most(tmp_path, numbers, least, most):
    fill(tmp_path, {"a.png": png()})
    columns = {"file": ["a.png"] * 4000, "id": [str(k) for k in range(4000)],
               "caption": [f"caption {number}" for number in numbers]}  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "all.parquet", row_group_size=40)
    found = look_at(str(tmp_path / "all.parquet"), most=416)
    assert (found.rows, found.times) == (416, 4000 / 416)
    seen = {caption.text for entry in found.listing.entries for caption in entry.captions}
    assert found.captions == len(seen)
    assert least <= round(found.caption_times * found.captions) <= most


def test_several_files_and_few_row_groups(folder, tmp_path):
    for name in ("one.parquet", "two.parquet"):
        (tmp_path / "tables").mkdir(exist_ok=True)
        write(tmp_path / "tables", name, 1)
        table = pq.read_table(tmp_path / "tables" / name)
        files = pa.array([f"{folder}/{file}" for file in table["file"].to_pylist()])
        pq.write_table(table.set_column(0, "file", files), tmp_path / "tables" / name)
    found = look_at(str(tmp_path / "tables"), most=10)
    assert (found.rows, found.total) == (10, 2 * ROWS)
    assert len(found.listing.entries) == 5  # a file that both name is one sample


def test_what_is_not_too_long_is_listed_as_ever(folder):
    write(folder, "all.parquet", 2)
    source = str(folder / "all.parquet")
    found = look_at(source, most=2 * ROWS)
    assert found.whole
    assert found.listing == list_media(source)


def test_a_source_is_walked_once():
    rows = [{"file": f"{k % 5}/{k}.png", "caption": "c"} for k in range(20)]
    media = {row["file"]: png() for row in rows}
    source, counts = counted("walked", {**media, "captions.jsonl": jsonl(*rows)})
    assert len(look_at(source, most=100).listing.entries) == 20
    assert counts["find"] == 1


LINES = {
    "jsonl": lambda name, text: json.dumps({"file": name, "caption": text}) + "\n",
    "csv": lambda name, text: f'{name},"{text}"\n',
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("files", [1, 3])
def test_the_beginnings_of_long_lines_tell_how_many_there_are(folder, monkeypatch, kind, files):
    """Captions have line ends in them, so that the first bytes may end within a row."""
    monkeypatch.setattr(manifest_rows, "HEAD", 1000)
    monkeypatch.setattr(manifest_sample, "LONG", 5000)
    for number in range(files):
        lines = [LINES[kind](f"{k % 80}-0.png", f"line\nof {k:04d}") for k in range(1000)]
        head = "file,caption\n" if kind == "csv" else ""
        (folder / f"all-{number}.{kind}").write_text(head + "".join(lines))
    source = str(folder / f"all-*.{kind}")
    whole = list_media(source)
    assert len(whole.entries) == 80
    found = look_at(source, most=10_000)
    assert found.about
    assert 15 * files < found.rows < 50 * files
    assert found.total == pytest.approx(1000 * files, rel=0.1)
    assert found.listing.rejects == []
    said = {entry.id: {caption.text for caption in entry.captions} for entry in whole.entries}
    for entry in found.listing.entries:
        assert {caption.text for caption in entry.captions} <= said[entry.id]
    assert look_at(source, most=6).rows == 6


def test_lines_that_are_not_long_are_listed_as_ever(folder):
    rows = [{"file": "0-0.png", "caption": f"caption {k}"} for k in range(200)]
    fill(folder, {"all.jsonl": jsonl(*rows)})
    found = look_at(str(folder / "all.jsonl"), most=6)
    assert found.whole
    assert found.listing == list_media(str(folder / "all.jsonl"))


def test_nothing_usable(folder, tmp_path):
    write(tmp_path, "lost.parquet", 2)
    with pytest.raises(UserError, match="none of 10 entries"):
        look_at(str(tmp_path / "lost.parquet"), most=10)


def test_files_asked_for_one_by_one_are_those_of_a_listing(s3):
    fs = fsspec.filesystem("s3")
    names = [f"{s3}/sampled/{k}.png" for k in range(3)]
    for name in names:
        fs.pipe(name, png(1))
    place = find_place(f"{s3}/sampled")
    paths = [file.path for file in place.files.values()]
    assert stat_each(place.fs, [*paths, paths[0] + ".gone"]) == stat_files(place.fs, paths)
