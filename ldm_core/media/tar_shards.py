"""WebDataset: tar archives whose members are samples, `000001.jpg` beside `000001.txt`.

Nothing is extracted: a sample is an archive, an offset and a size, and a worker reads those bytes.
An archive has no table of contents, so listing one reads all its headers and captions, in order;
from a bucket that is most of the archive where pictures are small.
"""

import json
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem

from ldm_core.errors import BadMedia
from ldm_core.media.caption_tables import CAPTION_COLUMNS
from ldm_core.media.entries import Candidate, Fault, media_kind
from ldm_core.media.local_walk import FoundFile
from ldm_core.media.locators import member_uri
from ldm_core.media.places import READERS, Place
from ldm_core.media.tar_members import Member, read_members
from ldm_core.media.weighted_captions import LONGEST_TEXT, Pair, caption_pairs

READ_AHEAD = 1 << 20  # bytes of one request: pictures are read through, videos stepped over


@dataclass(slots=True)
class _Sample:
    """Members with one key: what to encode, and what is said of it by extension."""

    media: list[Member] = field(default_factory=list)
    said: dict[str, bytes] = field(default_factory=dict)


def list_shards(place: Place) -> Iterator[Candidate]:
    """The samples of all tars of a place, by "<tar>/<key>"."""
    with ThreadPoolExecutor(READERS) as readers:
        shards = readers.map(
            lambda id: list_shard(place.fs, id, place.files[id]), place.ending(".tar")
        )
        for samples in shards:
            yield from samples


def list_shard(fs: AbstractFileSystem, name: str, file: FoundFile) -> list[Candidate]:
    """The samples of one tar, called `name`.

    A sample's key is its members' path up to the first dot of the last part, as WebDataset has
    it, wherever they lie in the archive. Captions come from its `.json` ("caption" or "text", as
    in a table, with "weight"), or else from its `.txt`. Samples with neither picture nor video
    are ignored, as hidden files are.

    Reject reasons: "unsafe path" (an absolute path, "..", a link, a device), "duplicate id",
    "unreadable caption", "no caption", "bad weight", and of the tar itself "truncated archive"
    and "damaged archive", after which the members before are listed all the same.
    """
    uri = fs.unstrip_protocol(file.path)
    samples: dict[str, _Sample] = {}
    found: list[Candidate] = []
    with fs.open(file.path, "rb", block_size=READ_AHEAD, cache_type="readahead") as archive:
        try:
            for member in read_members(archive):
                fault = _fault(member)
                if fault:
                    id = posixpath.join(name, member.name.lstrip("/"))
                    found.append(Candidate(id, uri, None, [], fault=fault))
                else:
                    _collect(samples, member, archive)
        except BadMedia as bad:
            found.append(Candidate(name, uri, None, [], fault=(bad.reason, bad.detail)))
    for key, sample in samples.items():
        found.extend(_candidates(f"{name}/{key}", uri, file.etag, sample))
    return found


def _fault(member: Member) -> Fault | None:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "unsafe path", member.name
    if not member.is_plain:
        return "unsafe path", f"{member.name} is a link, a device or a sparse file"
    return None


def _collect(samples: dict[str, _Sample], member: Member, archive: BinaryIO) -> None:
    folder, base = posixpath.split(posixpath.normpath(member.name))
    stem, _, extension = base.partition(".")
    if not stem:
        return  # hidden, such as the "._a.jpg" that macOS adds
    sample = samples.setdefault(posixpath.join(folder, stem), _Sample())
    if media_kind(base):
        sample.media.append(member)
    elif extension in ("txt", "json"):
        archive.seek(member.offset)
        sample.said[extension] = archive.read(min(member.size, LONGEST_TEXT + 1))


def _candidates(id: str, uri: str, etag: str | None, sample: _Sample) -> Iterator[Candidate]:
    """One for every picture and video; several have one id, which `sort_out` refuses."""
    fault, pairs = ("", ""), list[Pair]()
    try:
        pairs = _captions(sample.said) if sample.media else []
    except (ValueError, RecursionError) as error:
        fault = ("unreadable caption", str(error))
    for member in sample.media:
        locator = member_uri(uri, member.offset, member.size)
        yield Candidate(id, locator, media_kind(member.name), list(pairs), member.size, etag, fault)


def _captions(said: dict[str, bytes]) -> list[Pair]:
    """What a sample's text members say.

    Raises:
        ValueError: not UTF-8, not JSON, too long, or no texts where captions are expected.
    """
    if any(len(data) > LONGEST_TEXT for data in said.values()):
        raise ValueError(f"more than {LONGEST_TEXT} bytes of text")
    record: Any = json.loads(said["json"]) if "json" in said else None
    if isinstance(record, dict):
        cells = [record[name] for name in CAPTION_COLUMNS if record.get(name) is not None]
        if cells:
            return caption_pairs(cells[0], record.get("weight", record.get("weights")))
    return [(said["txt"].decode("utf-8-sig"), None)] if "txt" in said else []
