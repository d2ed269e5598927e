"""Symbolic links in a user's folder, and other things that are not plain files."""

import os
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_files import captions_of, fill, jsonl, png, reasons_of

from ldm_core.errors import UserError
from ldm_core.media.locators import read_media
from ldm_core.media.sources import list_media, look_at


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "secret", {"key.png": png(99), "key.txt": b"private words"})
    return fill(tmp_path / "data", {"a.png": png(1), "a.txt": b"a", "sub/b.png": png(2)})


def test_links_to_files_inside_are_files(folder):
    (folder / "c.png").symlink_to("sub/b.png")
    (folder / "c.txt").symlink_to(folder / "a.txt")
    listing = list_media(str(folder))
    assert captions_of(listing) == {"a.png": {"a": 1}, "c.png": {"a": 1}}
    assert reasons_of(listing) == {"sub/b.png": "no caption"}
    assert read_media(listing.entries[1].uri) == png(2)
    assert listing.entries[1].size == len(png(2))


def test_a_changed_target_is_noticed_through_its_link(folder):
    (folder / "c.png").symlink_to("sub/b.png")
    (folder / "c.txt").write_text("c")
    before = list_media(str(folder)).entries[1]
    os.utime(folder / "sub/b.png", ns=(1, 1))
    assert list_media(str(folder)).entries[1].etag != before.etag


@pytest.mark.parametrize("name", ["x.png", "link", "sub/deep.png"])
@pytest.mark.parametrize("target", ["secret/key.png", "secret", "."])
def test_links_that_lead_out_are_not_followed(folder, tmp_path, name, target):
    (folder / name).symlink_to(tmp_path / target)
    listing = list_media(str(folder))
    assert captions_of(listing) == {"a.png": {"a": 1}}
    assert reasons_of(listing) == {"sub/b.png": "no caption", name: "symlink outside folder"}


def test_a_link_to_a_neighbour_with_the_same_beginning_leads_out(folder, tmp_path):
    fill(tmp_path / "data-2", {"n.png": png(3)})
    (folder / "n.png").symlink_to(tmp_path / "data-2" / "n.png")
    assert reasons_of(list_media(str(folder)))["n.png"] == "symlink outside folder"


def test_a_linked_text_is_not_read(folder, tmp_path):
    fill(folder, {"k.png": png(3)})
    (folder / "k.txt").symlink_to(tmp_path / "secret" / "key.txt")
    listing = list_media(str(folder))
    assert captions_of(listing) == {"a.png": {"a": 1}}
    assert reasons_of(listing)["k.txt"] == "symlink outside folder"
    assert "private" not in repr(listing)


def test_a_linked_table_is_refused(folder, tmp_path):
    fill(tmp_path, {"captions.jsonl": jsonl({"file": "a.png", "caption": "x"})})
    (folder / "captions.jsonl").symlink_to(tmp_path / "captions.jsonl")
    with pytest.raises(UserError, match=r"captions.jsonl: symlink outside folder"):
        list_media(str(folder))


def test_loops_end(folder):
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "here").symlink_to(".")
    (folder / "self.png").symlink_to("self.png")
    (folder / "one.png").symlink_to("two.png")
    (folder / "two.png").symlink_to("one.png")
    (folder / "gone.png").symlink_to("nothing.png")
    listing = list_media(str(folder))
    assert captions_of(listing) == {"a.png": {"a": 1}}
    assert reasons_of(listing) == {
        "sub/b.png": "no caption",
        "gone.png": "file missing",
        **dict.fromkeys(("self.png", "one.png", "two.png"), "symlink loop"),
    }


def test_the_source_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "alias").symlink_to(folder)
    assert captions_of(list_media(str(tmp_path / "alias"))) == {"a.png": {"a": 1}}


def test_a_pipe_is_never_opened(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("it would block its reader")
    assert captions_of(list_media(str(folder))) == {"a.png": {"a": 1}}


def test_names_that_are_not_utf_8(folder):
    odd = os.fsencode(folder) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(png())
    (folder / "two::hosts.png").write_bytes(png())
    listing = list_media(str(folder))
    assert reasons_of(listing) == {
        "sub/b.png": "no caption",
        "caf\\udce9.png": "name is not UTF-8",
        "two::hosts.png": "unsafe path",
    }


@contextmanager
def not_as_root():
    """Root may read everything."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_a_closed_subfolder_is_not_silently_skipped():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = fill(Path(folder), {"a.png": png(), "a.txt": b"a", "sub/b.png": png()}) / "sub"
        closed.chmod(0)
        with not_as_root(), pytest.raises(UserError, match="may not be read"):
            list_media(folder)
        closed.chmod(0o755)
        with not_as_root():
            assert list(captions_of(list_media(folder))) == ["a.png"]


@pytest.mark.parametrize("look", [list_media, partial(look_at, most=1)], ids=["all", "some"])
def test_a_closed_manifest_is_told_by_its_name(look):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        closed = Path(folder, "all.parquet")
        pq.write_table(pa.table({"file": ["a.png"] * 2, "caption": ["a"] * 2}), closed)
        closed.chmod(0)
        with not_as_root(), pytest.raises(UserError, match=r"all\.parquet may not be read"):
            look(str(closed))


def test_a_manifest_follows_no_link_out_of_its_folder(folder, tmp_path):
    (folder / "x.png").symlink_to(tmp_path / "secret" / "key.png")
    (folder / "dir").symlink_to(tmp_path / "secret")
    rows = [{"file": file, "caption": "c"} for file in ("a.png", "x.png", "dir/key.png")]
    fill(folder, {"m.jsonl": jsonl(*rows)})
    listing = list_media(str(folder / "m.jsonl"))
    assert list(captions_of(listing)) == ["a.png"]
    assert set(reasons_of(listing).values()) == {"symlink outside folder"}
