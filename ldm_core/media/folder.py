"""A user's folder of captioned pictures, local or in a bucket, listed into rows and rejects.

Captions come from one table at the folder's root (`captions.jsonl|csv|parquet`, or the
Hugging Face imagefolder's `metadata.jsonl|csv`), or else from `.txt` files beside the pictures.
"""

import posixpath
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import fsspec
from fsspec.core import url_to_fs

from ldm_core.errors import UserError
from ldm_core.media.caption_tables import TABLE_COLUMNS, clean, read_table

IMAGE_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
)
SIDECAR_READERS = 16  # requests in flight; a bucket answers each in tens of milliseconds


@dataclass(frozen=True)
class CaptionedImage:
    """One picture to encode; `id` is its path relative to the folder, with forward slashes."""

    id: str
    uri: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Reject:
    """One file or table row that cannot be used, and why; `reason` is short and countable."""

    id: str
    uri: str
    stage: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """Every picture found and every file named, each in exactly one of the two, sorted by id."""

    images: list[CaptionedImage]
    rejects: list[Reject]


def list_captioned_images(folder: str) -> Listing:
    """List the pictures under `folder` (a path or any fsspec URI) with their captions.

    Several rows naming one file give one picture with several captions, in order, without
    repeats. Reject reasons: "no caption", "file missing", "path outside folder", "not an image
    file", "unreadable caption". Without a table, `.txt` files beside no picture are ignored.

    Raises:
        UserError: no such folder, no pictures in it, no captions, two caption tables, or a
            table that cannot be read.
    """
    fs, found = _find_files(folder)
    images = {id for id in found if _extension(id) in IMAGE_EXTENSIONS}
    if not images:
        known = " ".join(sorted(IMAGE_EXTENSIONS))
        raise UserError(f"{folder} holds {len(found)} files but no pictures, which end in {known}")
    table = _only_table(folder, found)
    if table:
        captions = read_table(table, fs.cat_file(found[table]))
        rejects: dict[str, tuple[str, str]] = {}
    else:
        captions, rejects = _read_sidecars(fs, found, images)
        if not captions and not rejects:
            raise UserError(
                f"{folder} has {len(images)} pictures but no captions: add captions.jsonl with "
                'lines such as {"file": "a.png", "caption": "a dog"}, or a.txt beside a.png'
            )
    uris = {id: fs.unstrip_protocol(path) for id, path in found.items()}
    listing = _sort_out(captions, images, uris, rejects, f"listed in {table}" if table else "")
    if not listing.images:
        first = listing.rejects[0]
        raise UserError(
            f"none of {len(listing.rejects)} entries of {folder} is usable; the first, "
            f"{first.id!r}: {first.reason}. Files are named relative to the folder"
        )
    return listing


def read_bytes(uri: str) -> bytes:
    """The bytes of one file, local or remote."""
    fs, path = url_to_fs(uri)
    return fs.cat_file(path)


def _find_files(folder: str) -> tuple[fsspec.AbstractFileSystem, dict[str, str]]:
    """The folder's file system, and path by id of every file under it."""
    try:
        fs, root = url_to_fs(folder)
    except (ValueError, ImportError) as error:  # an unknown scheme, or its driver is missing
        raise UserError(f"{folder} cannot be opened: {error}") from error
    fs.invalidate_cache()  # a bucket grows between runs
    try:
        if fs.isfile(root):
            raise UserError(f"{folder} is a file: name the folder that holds the pictures")
        paths = fs.find(root)
    except FileNotFoundError:
        paths = []
    except PermissionError as error:
        raise UserError(f"{folder} may not be read ({error}): check the credentials") from error
    if not paths:
        raise UserError(f"{folder} is empty or does not exist: name a folder of pictures")
    return fs, {path.removeprefix(root).lstrip("/"): path for path in paths}


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _only_table(folder: str, found: Iterable[str]) -> str | None:
    tables = [name for name in TABLE_COLUMNS if name in found]
    if len(tables) > 1:
        raise UserError(f"{folder} has {' and '.join(tables)}: keep the one that is meant")
    return tables[0] if tables else None


def _read_sidecars(
    fs: fsspec.AbstractFileSystem, found: dict[str, str], images: set[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, str]]]:
    """Captions by image, one per `.txt`, and (reason, detail) of those that are not UTF-8."""
    texts = {posixpath.splitext(id)[0]: id for id in found if _extension(id) == ".txt"}
    wanted = [
        (id, texts[posixpath.splitext(id)[0]])
        for id in sorted(images)
        if posixpath.splitext(id)[0] in texts
    ]
    captions: dict[str, tuple[str, ...]] = {}
    rejects: dict[str, tuple[str, str]] = {}
    with ThreadPoolExecutor(SIDECAR_READERS) as readers:
        blobs = readers.map(lambda pair: fs.cat_file(found[pair[1]]), wanted)
        for (id, text), blob in zip(wanted, blobs, strict=True):
            try:
                captions[id] = clean([blob.decode("utf-8-sig")])
            except UnicodeDecodeError as error:
                rejects[id] = ("unreadable caption", f"{text}: {error}")
    return captions, rejects


def _sort_out(
    captions: dict[str, tuple[str, ...]],
    images: set[str],
    uris: dict[str, str],
    known_rejects: dict[str, tuple[str, str]],
    origin: str,
) -> Listing:
    """Put every file named or found into images or rejects, once."""
    listing = Listing([], [])
    for id in sorted(captions.keys() | images):
        reason, detail = known_rejects.get(id) or _fault(id, captions, images, uris)
        if reason:
            reject = Reject(id, uris.get(id, ""), "list", reason, detail or origin)
            listing.rejects.append(reject)
        else:
            listing.images.append(CaptionedImage(id, uris[id], captions[id]))
    return listing


def _fault(
    id: str, captions: dict[str, tuple[str, ...]], images: set[str], uris: dict[str, str]
) -> tuple[str, str]:
    """(reason, detail) of an unusable entry; two empty strings for a good one."""
    if id.startswith(("/", "../")) or id == ".." or "://" in id:
        return "path outside folder", ""
    if id not in uris:
        return "file missing", ""
    if id not in images:
        return "not an image file", ""
    if not captions.get(id):
        return "no caption", ""
    return "", ""
