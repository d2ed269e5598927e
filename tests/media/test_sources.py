"""What a source may be, and folders of pictures and videos."""

import os

import numpy as np
import pytest
from media_files import captions_of, counted, fill, jsonl, png, reasons_of, sample, tar_bytes

from ldm_core.errors import UserError
from ldm_core.media.entries import VIDEO_EXTENSIONS
from ldm_core.media.folder import list_captioned_images
from ldm_core.media.locators import read_media
from ldm_core.media.sources import list_media


def entry_of(listing, id):
    return next(entry for entry in listing.entries if entry.id == id)


def test_pictures_and_videos_with_texts_beside_them(tmp_path):
    videos = {f"clip{extension}": b"film" for extension in VIDEO_EXTENSIONS}
    texts = {f"{name.rpartition('.')[0]}.txt": b"a film" for name in videos}
    fill(tmp_path, videos | texts | {"UP.MP4": b"film", "UP.txt": b"up", "x.gif": b"", "n.md": b""})
    listing = list_media(str(tmp_path))
    assert {entry.id: entry.kind for entry in listing.entries} == dict.fromkeys(
        (*videos, "UP.MP4"), "video"
    )
    assert reasons_of(listing) == {"x.gif": "no caption"}
    entry = entry_of(listing, "clip.mp4")
    assert (entry.size, read_media(entry.uri)) == (4, b"film")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("metadata.jsonl", "file_name"),
        ("metadata.jsonl", "video_file_name"),
        ("metadata.jsonl", "depth_map_file_name"),
        ("captions.jsonl", "video"),
        ("captions.jsonl", "image_file_name"),
    ],
)
def test_hugging_face_folders(tmp_path, name, column):
    rows = [{column: "v/a.mp4", "text": "a film"}, {column: "b.png", "text": ["b", "c"]}]
    fill(tmp_path, {"v/a.mp4": b"", "b.png": png(), name: jsonl(*rows)})
    listing = list_media(str(tmp_path))
    assert captions_of(listing) == {"v/a.mp4": {"a film": 1}, "b.png": {"b": 0.5, "c": 0.5}}
    assert [entry.kind for entry in listing.entries] == ["image", "video"]


def test_every_split_has_its_own_table(tmp_path):
    train = jsonl({"file_name": "a.png", "text": "train"}, {"file_name": "../c.png", "text": "up"})
    test = b"file_name,text,weight\na.png,test,2\na.png,again,6\n"
    media = {name: png() for name in ("train/a.png", "test/a.png", "c.png", "test/b.png")}
    fill(tmp_path, {"train/metadata.jsonl": train, "test/metadata.csv": test, **media})
    listing = list_media(str(tmp_path))
    assert captions_of(listing) == {
        "c.png": {"up": 1},
        "train/a.png": {"train": 1},
        "test/a.png": {"test": 0.25, "again": 0.75},
    }
    assert reasons_of(listing) == {"test/b.png": "no caption"}
    # A table at the root speaks for all.
    fill(tmp_path, {"captions.jsonl": jsonl({"file": "test/b.png", "caption": "root"})})
    assert captions_of(list_media(str(tmp_path))) == {"test/b.png": {"root": 1}}


def test_a_table_below_reaches_no_further_than_the_source(tmp_path):
    row = jsonl({"file_name": "../../x.png", "text": "x"}, {"file_name": "a.png", "text": "a"})
    fill(tmp_path, {"x.png": png(), "data/train/metadata.jsonl": row, "data/train/a.png": png()})
    listing = list_media(str(tmp_path / "data"))
    assert list(captions_of(listing)) == ["train/a.png"]
    assert reasons_of(listing) == {"../x.png": "path outside folder"}


def test_weights_in_a_table(tmp_path):
    rows = [
        {"file": "a.png", "caption": "one", "weight": 1},
        {"file": "a.png", "caption": "two", "weight": 3},
        {"file": "b.png", "captions": ["one", "two"], "weights": [0, 2]},
        {"file": "c.png", "caption": "c", "weight": -1},
        {"file": "d.png", "caption": "half a smile \ud83d"},
        {"file": "e\udcff.png", "caption": "e"},
    ]
    fill(tmp_path, {f"{name}.png": png() for name in "abcd"} | {"captions.jsonl": jsonl(*rows)})
    listing = list_media(str(tmp_path))
    assert captions_of(listing) == {"a.png": {"one": 0.25, "two": 0.75}, "b.png": {"two": 1}}
    assert reasons_of(listing) == {
        "c.png": "bad weight",
        "d.png": "unreadable caption",
        "e\\udcff.png": "file missing",
    }


def test_a_change_of_equal_size_is_noticed(tmp_path):
    fill(tmp_path, {"a.png": png(1), "a.txt": b"a"})
    before = list_media(str(tmp_path)).entries[0]
    assert list_media(str(tmp_path)).entries[0] == before
    status = (tmp_path / "a.png").stat()
    fill(tmp_path, {"a.png": png(2)})
    os.utime(tmp_path / "a.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = list_media(str(tmp_path)).entries[0]
    assert after.size == before.size
    assert after.etag != before.etag


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "nowhere", "nowhere is empty or does not exist"),
        ({"a.png": b""}, "a.png", "is a file: name the folder that holds the pictures"),
        ({"a.txt": b""}, "a.txt", "is a file: name the folder"),
        ({"a.txt": b""}, "", "holds 1 files but no pictures or videos, which end in .avi"),
        ({"m.jsonl": b"{}"}, "", "holds 1 files but no pictures"),
        ({"a.png": b"", "b.mp4": b""}, "", "2 pictures but no captions: add captions.jsonl"),
        ({"a.png": b"", "train.csv": b""}, "", "or, if train.csv has them, give that file"),
        ({"a.tar": tar_bytes([("a.txt", b"x")])}, "a.tar", "holds no pictures or videos"),
        ({"a.tar": b"PK"}, "", "none of 1 entries .* 'a.tar': truncated archive"),
        ({"a.png": b"", "captions.csv": b"file,caption\n"}, "", "none of 1 entries"),
    ],
)
def test_sources_without_anything_usable(tmp_path, files, source, message):
    fill(tmp_path, files)
    with pytest.raises(UserError, match=message):
        list_media(str(tmp_path / source))


@pytest.mark.parametrize("source", ["http://host/data", "https://host/a.tar"])
def test_the_web_is_no_source(source):
    with pytest.raises(UserError, match="is a web address: copy the data"):
        list_media(source)


def test_loose_pictures_make_a_folder_of_pictures(tmp_path):
    files = {"a.png": png(), "a.txt": b"a", "b.tar": tar_bytes(sample("x")), "c.tar.gz": b""}
    fill(tmp_path, files)
    assert list(captions_of(list_media(str(tmp_path)))) == ["a.png"]


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    folder = fill(tmp_path / "x[1] {a,b} *", {"a.png": png(), "a.txt": b"a"})
    assert list(captions_of(list_media(str(folder)))) == ["a.png"]
    fill(folder, {"m.jsonl": jsonl({"file": "a.png", "caption": "b"})})
    assert captions_of(list_media(str(folder / "m.jsonl"))) == {"a.png": {"b": 1}}


def test_a_text_too_long_for_a_caption_is_not_read(tmp_path):
    fill(tmp_path, {"a.png": png(), "a.txt": b"a", "b.png": png()})
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(1 << 40)
    listing = list_media(str(tmp_path))
    assert list(captions_of(listing)) == ["a.png"]
    assert reasons_of(listing) == {"b.png": "unreadable caption"}


def test_shards_beside_their_statistics(tmp_path):
    """As img2dataset leaves them."""
    files = {"0.tar": tar_bytes(sample("x")), "0.parquet": b"", "0_stats.json": b"{}"}
    assert list(captions_of(list_media(str(fill(tmp_path, files))))) == ["0.tar/x"]


def test_pictures_only_for_those_who_want_no_videos(tmp_path):
    fill(tmp_path, {"a.png": png(), "a.txt": b"a", "b.mp4": b"", "b.txt": b"b"})
    listing = list_captioned_images(str(tmp_path))
    assert [(image.id, image.captions) for image in listing.images] == [("a.png", ("a",))]
    assert reasons_of(listing) == {"b.mp4": "not an image file"}
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="holds 1 videos but no pictures"):
        list_captioned_images(str(tmp_path))


def test_a_remote_folder_is_listed_without_a_request_for_each_file():
    files = {f"{i % 3}/{i:03d}.png": b"" for i in range(300)}
    texts = {f"{i % 3}/{i:03d}.txt": b"caption" for i in range(0, 300, 2)}
    folder, counts = counted("beside", files | texts)
    assert len(list_media(folder).entries) == len(texts)
    assert counts["cat_file"] == len(texts)
    assert counts["ls"] + counts["info"] < 20
    rows = [{"file": name, "caption": "c"} for name in files]
    folder, counts = counted("table", files | {"captions.jsonl": jsonl(*rows)})
    assert len(list_media(folder).entries) == len(files)
    assert counts["cat_file"] == 1
    assert counts["ls"] + counts["info"] < 20


def test_a_folder_of_twenty_thousand(tmp_path):
    for part in range(20):
        (tmp_path / f"{part:02d}").mkdir()
    names = [f"{i % 20:02d}/{i:05d}.png" for i in range(20_000)]
    for name in names:
        os.close(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY))
    rows = [{"file": name, "caption": "c"} for name in np.random.default_rng(0).permutation(names)]
    fill(tmp_path, {"captions.jsonl": jsonl(*rows)})
    listing = list_media(str(tmp_path))
    assert [entry.id for entry in listing.entries] == sorted(names)


def test_in_a_bucket(s3):
    import s3fs

    fs = s3fs.S3FileSystem()
    rows = jsonl(
        {"file": "a.png", "caption": "a"},
        {"file": "sub/b.mp4", "caption": "b"},
        {"file": "../other/a.png", "caption": "c"},
    )
    for name, content in {"a.png": png(1), "sub/b.mp4": b"film", "captions.jsonl": rows}.items():
        fs.pipe_file(f"{s3}/media/{name}", content)
    fs.pipe_file(f"{s3}/media/sub/", b"")  # a "folder", as consoles make them
    for source in (f"{s3}/media", f"{s3}/media/", f"{s3}/media/captions.jsonl"):
        listing = list_media(source)
        assert captions_of(listing) == {"a.png": {"a": 1}, "sub/b.mp4": {"b": 1}}
        assert list(reasons_of(listing).values()) == ["path outside folder"]
        assert [entry.size for entry in listing.entries] == [len(png(1)), 4]
        assert [read_media(entry.uri) for entry in listing.entries] == [png(1), b"film"]
    before = list_media(f"{s3}/media").entries[0]
    fs.pipe_file(f"{s3}/media/a.png", png(2))
    after = list_media(f"{s3}/media").entries[0]
    assert after.size == before.size
    assert after.etag != before.etag
    with pytest.raises(UserError, match="is empty or does not exist"):
        list_media(f"{s3}/nothing")
