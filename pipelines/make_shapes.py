"""Stage 0, for whoever has no pictures yet: a captioned data set of coloured shapes."""

import io
import json
import posixpath
import tempfile
from pathlib import Path

from PIL import Image

from ldm_core.errors import UserError
from ldm_core.files import (
    absolute,
    filesystem,
    is_remote,
    join,
    read_bytes,
    remove,
    upload_folder,
    write_bytes,
)
from ldm_core.media.shapes import CAPTIONS, caption_line, draw_scene, write_shapes
from pipelines.progress import Progress

OURS = {"images", CAPTIONS, f"{CAPTIONS}.partial"}


def make_shapes(out: str, count: int, size: int, seed: int) -> None:
    """Write the data set to a folder or URI; same numbers, same bytes, so not a second time.

    Raises:
        UserError: a number out of range, or a folder that holds pictures of the user's.
    """
    if holds_other_pictures(out):
        raise UserError(f"{out} already holds other files: choose an empty folder")
    if _holds(out, count, size, seed):
        print(f"[shapes] up to date: {out} has these {count} pictures", flush=True)
        return
    if not is_remote(out):
        _write(Path(absolute(out)), count, size, seed)
        return
    with tempfile.TemporaryDirectory(prefix="ldm-shapes-") as folder:
        _write(Path(folder), count, size, seed)
        remove(join(out, CAPTIONS))
        upload_folder(Path(folder, "images"), join(out, "images"))
        # last: a folder with captions is a whole data set
        write_bytes(join(out, CAPTIONS), Path(folder, CAPTIONS).read_bytes())


def names_in(folder: str) -> set[str]:
    """What lies directly in a folder or under a prefix; nothing if there is none."""
    fs, path = filesystem(folder)
    try:
        found = {each.rstrip("/") for each in fs.ls(path, detail=False)}
    except FileNotFoundError:
        return set()
    return {posixpath.basename(each) for each in found - {path.rstrip("/")}}


def holds_other_pictures(folder: str) -> bool:
    """Whether there is anything that `ldm shapes` does not write."""
    names = {name for name in names_in(folder) if not name.startswith(".")}
    if names - OURS:
        return True
    captions = read_bytes(join(folder, CAPTIONS)) if CAPTIONS in names else b""
    return bool(captions) and b'"objects": [' not in captions.splitlines()[0]


def _holds(out: str, count: int, size: int, seed: int) -> bool:
    """Whether the data set of these numbers is there, whole; its captions came last.

    A line is a function of seed and index, so those of two indices tell seeds apart.
    """
    lines = []
    if CAPTIONS in names_in(out):
        lines = read_bytes(join(out, CAPTIONS)).decode().splitlines()
    ends = {0, count - 1}
    if (
        not lines
        or len(lines) != count
        or any(lines[i] != caption_line(draw_scene(seed, i), i) for i in ends)
    ):
        return False
    files = [json.loads(line)["file"] for line in lines]
    if not {file.removeprefix("images/") for file in files} <= names_in(join(out, "images")):
        return False  # somebody took some away
    first = files[0]
    return Image.open(io.BytesIO(read_bytes(join(out, first)))).size == (size, size)


def _write(folder: Path, count: int, size: int, seed: int) -> None:
    with Progress("shapes", count, "pictures") as bar:
        write_shapes(folder, count, size, seed, bar.update)
