"""A folder of pictures and videos, with captions in tables or in text files beside them.

The tables are `captions.jsonl|csv|parquet` or the `metadata.jsonl|csv|parquet` of Hugging Face's
imagefolder and videofolder: the one at the folder's root, or else those of its subfolders, such as
one of every split, each naming files relative to itself. Without a table, `a.txt` beside `a.png`.
"""

import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ldm_core.errors import UserError
from ldm_core.media.caption_tables import TABLE_COLUMNS, read_table
from ldm_core.media.entries import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Candidate,
    Fault,
    media_kind,
)
from ldm_core.media.places import READERS, Place
from ldm_core.media.weighted_captions import LONGEST_TEXT, Pair


def list_folder(place: Place) -> Iterator[Candidate]:
    """Every picture, every video and every file that a table names.

    Reject reasons: "no caption", "file missing", "path outside folder", "not an image or video",
    "unreadable caption", "bad weight", and of links "symlink outside folder", "symlink loop".
    Without a table, `.txt` files beside no picture are ignored.

    Raises:
        UserError: no pictures or videos, no captions, two tables in one folder, or a table that
            cannot be read.
    """
    media = [id for id in place.files if media_kind(id)]
    if not media:
        known = " ".join(sorted(IMAGE_EXTENSIONS | VIDEO_EXTENSIONS))
        raise UserError(
            f"{place.source} holds {len(place.files)} files but no pictures or videos, "
            f"which end in {known}"
        )
    tables = _tables(place)
    if tables:
        for table in tables:
            yield from _named(place, table)
        yield from _found(place, media, {})
    else:
        yield from _captioned_beside(place, media)


def _tables(place: Place) -> list[str]:
    """The table at the root, or else the tables below it."""
    folders: dict[str, list[str]] = {}
    for table, file in sorted(place.files.items()):
        folder, name = posixpath.split(table)
        if name in TABLE_COLUMNS:
            if file.fault[0]:
                raise UserError(f"{place.source}: {table}: {file.fault[0]}; put the table itself")
            folders.setdefault(folder, []).append(table)
    used = [folders[""]] if "" in folders else list(folders.values())
    for tables in used:
        if len(tables) > 1:
            raise UserError(
                f"{place.source} has {' and '.join(tables)}: keep the one that is meant"
            )
    return [tables[0] for tables in used]


def _named(place: Place, table: str) -> Iterator[Candidate]:
    """What one table names."""
    folder, origin = posixpath.dirname(table), f"listed in {table}"
    for name, pairs in read_table(table, place.read(table)).items():
        id = posixpath.normpath(posixpath.join(folder, name))
        if id.startswith(("/", "../")) or id == ".." or "://" in id:
            fault = ("path outside folder", "")
            yield Candidate(id, "", None, pairs, fault=fault, origin=origin)
        elif id not in place.files:
            yield Candidate(id, "", None, pairs, fault=("file missing", ""), origin=origin)
        else:
            yield _candidate(place, id, pairs, origin=origin)


def _found(
    place: Place, media: Iterable[str], captions: dict[str, list[Pair]]
) -> Iterator[Candidate]:
    """The files themselves, whether anything names them or not, and the links that lead astray."""
    astray = [id for id, file in place.files.items() if file.fault[0]]
    for id in dict.fromkeys([*media, *astray]):
        yield _candidate(place, id, captions.get(id, []))


def _candidate(place: Place, id: str, pairs: list[Pair], origin: str = "") -> Candidate:
    file = place.files[id]
    kind, uri = media_kind(id), place.uri(id)
    return Candidate(id, uri, kind, pairs, file.size, file.etag, file.fault, origin)


def _captioned_beside(place: Place, media: list[str]) -> Iterator[Candidate]:
    texts = {posixpath.splitext(id)[0]: id for id in place.ending(".txt")}
    beside = {id: texts.get(posixpath.splitext(id)[0]) for id in sorted(media)}
    wanted = [(id, text) for id, text in beside.items() if text and not place.files[id].fault[0]]
    if not wanted:
        raise UserError(_no_captions(place, len(media)))
    captions: dict[str, list[Pair]] = {}
    with ThreadPoolExecutor(READERS) as readers:
        found = readers.map(lambda text: _text(place, text), (text for _, text in wanted))
        for (id, text), (caption, problem) in zip(wanted, found, strict=True):
            captions[id] = [(caption, None)]
            if problem:
                fault: Fault = ("unreadable caption", f"{text}: {problem}")
                yield Candidate(id, place.uri(id), None, [], fault=fault)
    yield from _found(place, media, captions)


def _text(place: Place, id: str) -> tuple[str, str]:
    """What a text file says, or else what keeps it from being read."""
    size = place.files[id].size
    if size is not None and size > LONGEST_TEXT:
        return "", f"{size} bytes are no caption"
    try:
        return place.read(id).decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        return "", str(error)


def _no_captions(place: Place, count: int) -> str:
    others = place.ending(".jsonl", ".csv", ".parquet", ".tar")
    hint = f"; or, if {others[0]} has them, give that file as the data" if others else ""
    return (
        f"{place.source} has {count} pictures but no captions: add captions.jsonl with "
        f'lines such as {{"file": "a.png", "caption": "a dog"}}, or a.txt beside a.png{hint}'
    )
