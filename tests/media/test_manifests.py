import os
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import captions_of, counted, fill, jsonl, png, reasons_of

from ldm_core.errors import UserError
from ldm_core.media import manifest_rows
from ldm_core.media.locators import MediaReader, read_media
from ldm_core.media.sources import list_media

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path, columns, row_group_size=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **options)
    return str(path)


def parquet_bytes(columns, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "data", {"a.png": png(1), "more/b.jpg": png(2), "c.mp4": b"a film"})


@pytest.fixture
def batches_end_early(monkeypatch):
    """As Arrow's do where a text column reaches 2 GiB; here after three rows."""
    whole = pq.ParquetFile.iter_batches

    def early(self, batch_size, **some):
        return whole(self, min(batch_size, 3), **some)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", early)


@pytest.mark.parametrize("inline", [True, False])
def test_a_row_group_of_several_batches_is_listed_whole(tmp_path, batches_end_early, inline):
    fill(tmp_path, {f"{k}.png": png(k) for k in range(8)})
    media = {"bytes": [png(k) for k in range(8)]} if inline else {}
    named = {"file": [f"{k}.png" for k in range(8)], "caption": [f"c{k}" for k in range(8)]}
    listing = list_media(write_parquet(tmp_path / "all.parquet", {**media, **named}, 8))
    assert sorted(captions_of(listing).values(), key=str) == [{f"c{k}": 1} for k in range(8)]
    assert {read_media(entry.uri) for entry in listing.entries} == {png(k) for k in range(8)}


def test_rows_that_do_not_come_are_an_error(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "a.parquet", {"file": ["a.png"] * 4, "caption": ["c"] * 4})
    whole = pq.ParquetFile.iter_batches
    some = lambda self, size, **told: islice(whole(self, 3, **told), 1)  # noqa: E731
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", some)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 should have 4 rows and 3 could"):
        list_media(source)


@pytest.mark.parametrize("column", ["uri", "url", "file", "file_name", "path", "video_file_name"])
def test_json_lines_name_files_relative_to_themselves(folder, column):
    rows = [
        {column: "a.png", "caption": "one", "weight": 3},
        {column: "./a.png", "caption": "two", "weight": 1},
        {column: f"{folder}/more/b.jpg", "text": "three"},
        {column: f"file://{folder}/c.mp4", "captions": [{"text": "f", "weight": 2}, "g"]},
    ]
    fill(folder, {"list.jsonl": jsonl(*rows)})
    listing = list_media(str(folder / "list.jsonl"))
    assert captions_of(listing) == {
        "a.png": {"one": 0.75, "two": 0.25},
        f"{folder}/more/b.jpg": {"three": 1},
        f"file://{folder}/c.mp4": {"f": 2 / 3, "g": 1 / 3},
    }
    assert listing.rejects == []
    found = {entry.uri.rpartition("/")[2]: entry for entry in listing.entries}
    assert {name: read_media(entry.uri) for name, entry in found.items()} == {
        "a.png": png(1),
        "b.jpg": png(2),
        "c.mp4": b"a film",
    }
    assert [found[name].kind for name in ("a.png", "b.jpg", "c.mp4")] == ["image", "image", "video"]
    assert found["c.mp4"].size == 6
    assert found["c.mp4"].etag == str((folder / "c.mp4").stat().st_mtime_ns)


def test_csv_with_ids_and_weights(folder):
    text = "id,uri,caption,weight\n7,a.png,one,0.5\n7,a.png,two,\n8,c.mp4,film,\n9,c.mp4,film,x\n"
    fill(folder, {"list.csv": text.encode()})
    listing = list_media(str(folder / "list.csv"))
    assert captions_of(listing) == {"7": {"one": 1 / 3, "two": 2 / 3}, "8": {"film": 1}}
    assert reasons_of(listing) == {"9": "bad weight"}


def test_every_bad_row_is_a_reject_of_its_own(folder):
    rows = {
        "https://example.com/a.png": "remote url not allowed",
        "http://169.254.169.254/a.png": "remote url not allowed",
        "ftp://host/a.png": "remote url not allowed",
        "github://o:r@main/a.png": "remote url not allowed",
        "zip://x.png::http://host/a.zip": "unsafe path",
        "nul\0.png": "unsafe path",
        "../a.png": "path outside folder",
        "more/../../a.png": "path outside folder",
        "gone.png": "file missing",
        "/nowhere/gone.png": "file missing",
        "a.png/b.png": "file missing",
        "more": "file missing",
        "list.jsonl": "not an image or video",
        "": "no file named",
        None: "no file named",
        7: "no file named",
    }
    lines = [{"uri": uri, "caption": "c", "id": f"{n:02d}"} for n, uri in enumerate(rows)]
    good = {"uri": "a.png", "caption": "c", "id": "good"}
    other = [{**good, "id": "30", "caption": 3}, {**good, "id": "31", "caption": None}]
    fill(folder, {"list.jsonl": jsonl(*lines, good, *other)})
    listing = list_media(str(folder / "list.jsonl"))
    assert list(captions_of(listing)) == ["good"]
    expected = {f"{n:02d}": reason for n, reason in enumerate(rows.values())}
    assert reasons_of(listing) == {**expected, "30": "unreadable caption", "31": "no caption"}


def test_rows_without_a_usable_name_are_named_by_their_place(folder):
    good = {"file": "a.png", "caption": "c"}
    fill(folder, {"list.jsonl": jsonl(good, {"file": None, "caption": "c"})})
    assert reasons_of(list_media(str(folder / "list.jsonl"))) == {"list.jsonl:2": "no file named"}


def test_one_id_for_two_files_is_neither(folder):
    rows = [{"id": 1, "file": "a.png", "caption": "a"}, {"id": 1, "file": "c.mp4", "caption": "c"}]
    fill(folder, {"list.jsonl": jsonl(*rows, {"id": 2, "file": "a.png", "caption": "again"})})
    listing = list_media(str(folder / "list.jsonl"))
    assert list(captions_of(listing)) == ["2"]
    assert reasons_of(listing) == {"1": "duplicate id"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b'{"uri": "a.png"}', "m.jsonl:1: no caption column; found uri, expected"),
        ("m.jsonl", b'{"title": "x", "caption": "c"}', "m.jsonl:1: no file column"),
        ("m.jsonl", b'{"uri": "a.png"', "m.jsonl:1: not JSON"),
        ("m.jsonl", b"[" * 100_000, "m.jsonl:1: not JSON"),
        ("m.csv", b"uri,title\n", "m.csv:1: no caption column"),
        ("m.csv", b"uri,caption\na.png,\xff\n", "not UTF-8"),
        ("m.parquet", b"PAR1 and then nothing PAR1", "m.parquet is not a Parquet file"),
        ("m.jsonl", b'{"uri": "b.png", "caption": "c"}', "none of 1 entries .* file missing"),
    ],
)
def test_manifests_that_cannot_be_read(folder, name, content, message):
    fill(folder, {name: content})
    with pytest.raises(UserError, match=message):
        list_media(str(folder / name))


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("image", pa.array([{"bytes": png(i), "path": f"{i}.png"} for i in range(7)], STRUCT), 0),
        ("video", pa.array([{"bytes": png(i), "path": None} for i in range(7)], STRUCT), 1),
        ("image", pa.array([{"bytes": png(i)} for i in range(7)]), 0),
        ("bytes", pa.array([png(i) for i in range(7)], pa.binary()), 0),
        ("video", pa.array([png(i) for i in range(7)], pa.large_binary()), 1),
    ],
)
def test_media_inside_parquet(tmp_path, column, values, kind):
    columns = {column: values, "text": [f"picture {i}" for i in range(7)]}
    source = write_parquet(tmp_path / "train-0.parquet", columns, row_group_size=3)
    listing = list_media(source)
    assert captions_of(listing) == {f"train-0.parquet/{i}": {f"picture {i}": 1} for i in range(7)}
    assert [read_media(entry.uri) for entry in listing.entries] == [png(i) for i in range(7)]
    assert {entry.kind for entry in listing.entries} == {("image", "video")[kind]}
    assert listing.entries[4].uri.endswith(f"train-0.parquet#row_group=1&row=1&column={column}")
    assert {entry.etag for entry in listing.entries} == {str(os.stat(source).st_mtime_ns)}


def test_the_kind_of_plain_bytes_is_that_of_their_name(tmp_path):
    columns = {"bytes": [b"1", b"2"], "file_name": ["a.mp4", "b.png"], "caption": ["a", "b"]}
    listing = list_media(write_parquet(tmp_path / "m.parquet", columns))
    assert [entry.kind for entry in listing.entries] == ["video", "image"]


def test_odd_column_names_survive_the_way(tmp_path):
    columns = {"image": pa.array([{"bytes": png(), "path": "x"}], STRUCT), "caption": ["a"]}
    source = write_parquet(tmp_path / "a#b.parquet", columns)
    assert read_media(list_media(source).entries[0].uri) == png()


def test_a_folder_of_parquet_files(tmp_path):
    weighted = pa.array(
        [[{"caption": "x", "weight": 1.0}, {"caption": "y", "weight": 3.0}], []],
        pa.list_(pa.struct([("caption", pa.string()), ("weight", pa.float32())])),
    )
    fill(tmp_path, {"README.md": b"a card", "_SUCCESS": b""})
    for name in ("data/0.parquet", "data/1.parquet"):
        write_parquet(tmp_path / name, {"image": [png(1), png(2)], "captions": weighted})
    ids = {"image": [png(3)] * 3, "caption": ["a", "b", "c"], "id": ["same", "same", "own"]}
    write_parquet(tmp_path / "ids.parquet", ids)
    listing = list_media(str(tmp_path))
    assert captions_of(listing) == {
        "data/0.parquet/0": {"x": 0.25, "y": 0.75},
        "data/1.parquet/0": {"x": 0.25, "y": 0.75},
        "own": {"c": 1},
    }
    assert reasons_of(listing) == {
        "data/0.parquet/1": "no caption",
        "data/1.parquet/1": "no caption",
        "same": "duplicate id",
    }


def test_parquet_that_names_files(folder):
    columns = {"file": ["../a.png", "b.jpg"], "caption": ["a", "b"]}
    write_parquet(folder / "more" / "m.parquet", columns)
    listing = list_media(str(folder / "more" / "m.parquet"))
    assert list(captions_of(listing)) == ["b.jpg"]
    assert list(reasons_of(listing).values()) == ["path outside folder"]


def test_a_group_whose_bytes_were_left_out_is_read_by_path(folder):
    kept = [{"bytes": png(9), "path": "a.png"}]
    left = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "gone.png"}]
    columns = {"image": pa.array(kept * 2 + left, STRUCT), "caption": ["a", "b", "c", "d"]}
    listing = list_media(write_parquet(folder / "m.parquet", columns, row_group_size=2))
    assert {id: read_media(uri_of(listing, id)) for id in captions_of(listing)} == {
        "m.parquet/0": png(9),
        "m.parquet/1": png(9),
        "a.png": png(1),
    }
    assert reasons_of(listing) == {"gone.png": "file missing"}


def uri_of(listing, id):
    return next(entry.uri for entry in listing.entries if entry.id == id)


def test_row_groups_too_large_for_a_worker(tmp_path, monkeypatch):
    columns = {"image": [bytes(os.urandom(1000)) for _ in range(10)], "caption": ["c"] * 10}
    source = write_parquet(tmp_path / "m.parquet", columns)
    monkeypatch.setattr(manifest_rows, "LARGEST_ROW_GROUP", 9_000)
    with pytest.raises(UserError, match="row group 0 holds .* smaller row groups"):
        list_media(source)


def test_the_lister_leaves_the_media_where_they_are():
    images = [os.urandom(50_000) for _ in range(40)]
    columns = {"image": images, "caption": [f"picture {i}" for i in range(40)]}
    data = parquet_bytes(columns, row_group_size=10)
    folder, counts = counted("inline", {"m.parquet": data})
    listing = list_media(f"{folder}/m.parquet")
    assert counts["bytes"] < 200_000 < len(data) // 10
    counts.clear()
    reader = MediaReader()
    assert [reader.read(entry.uri) for entry in sorted(listing.entries, key=by_row)] == images
    assert counts["open"] == 4  # a row group each
    assert counts["bytes"] < 1.2 * len(data)


def by_row(entry):
    return int(entry.id.rpartition("/")[2])


def test_remote_manifests_look_each_folder_up_once():
    files = {f"{n % 5}/{n}.png": png(n) for n in range(200)}
    rows = [{"uri": name, "caption": "c"} for name in files]
    remote, counts = counted("by-uri", files)
    fill_rows = jsonl(*rows, {"uri": f"{remote}/0/5.png", "caption": "by its address", "id": "x"})
    fill_rows += jsonl({"uri": "/etc/a.png", "caption": "c"}, {"uri": "file:///a.png", "text": "c"})
    counted("by-uri", {"m.jsonl": fill_rows})
    listing = list_media(f"{remote}/m.jsonl")
    assert len(listing.entries) == 201
    assert sorted(reasons_of(listing).values()) == ["path outside folder", "remote url not allowed"]
    assert counts["ls"] <= 8
    assert counts["info"] <= 8
    assert {entry.id: entry.size for entry in listing.entries} == {
        "x": len(files["0/5.png"]),
        **{name: len(content) for name, content in files.items()},
    }


def test_changed_manifests_are_noticed(tmp_path):
    columns = {"image": [png(1)], "caption": ["a"]}
    source = write_parquet(tmp_path / "m.parquet", columns)
    entry = list_media(source).entries[0]
    write_parquet(tmp_path / "m.parquet", {"other": [1]})
    with pytest.raises(UserError, match="is not as it was listed"):
        read_media(entry.uri)
    write_parquet(tmp_path / "m.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(UserError, match="is not as it was listed"):
        read_media(entry.uri)
