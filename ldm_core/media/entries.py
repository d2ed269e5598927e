"""What a source of media comes to: entries to encode and rejects, whatever the source was."""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ldm_core.errors import BadMedia
from ldm_core.media.weighted_captions import Caption, Pair, weigh

Kind = Literal["image", "video"]
Fault = tuple[str, str]  # reason and detail of what makes an entry unusable

IMAGE_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif")
)
VIDEO_EXTENSIONS = frozenset((".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"))


@dataclass(frozen=True, slots=True)
class MediaEntry:
    """One picture or video to encode.

    Attributes:
        id: its name within the source, the same in every listing of it.
        uri: where its bytes are, as `read_media` takes it.
        kind: "image" (a GIF too: its first frame) or "video".
        captions: at least one.
        size: bytes, where the listing tells.
        etag: changes whenever the bytes may have: the ETag of a bucket, or a file's modification
            time, so that touching a local file is a change. Inside an archive, the archive's.
    """

    id: str
    uri: str
    kind: Kind
    captions: tuple[Caption, ...]
    size: int | None
    etag: str | None


@dataclass(frozen=True, slots=True)
class Reject:
    """Something named or found that cannot be used, and why; `reason` is short and countable."""

    id: str
    uri: str
    stage: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """Everything a source names or holds, each id in exactly one of the two, sorted by id."""

    entries: list[MediaEntry]
    rejects: list[Reject]


@dataclass(slots=True)
class Candidate:
    """One sample as its source states it, not yet checked.

    Attributes:
        pairs: its captions with the weights as written.
        fault: what is known to be wrong with it; two empty texts for nothing.
        origin: what a reject without a detail tells, such as the table that names the file.
    """

    id: str
    uri: str
    kind: Kind | None
    pairs: list[Pair]
    size: int | None = None
    etag: str | None = None
    fault: Fault = ("", "")
    origin: str = ""


def media_kind(name: str) -> Kind | None:
    """The kind that a file's extension tells; None for other files."""
    extension = posixpath.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return "image"
    return "video" if extension in VIDEO_EXTENSIONS else None


def sort_out(candidates: Iterable[Candidate]) -> Listing:
    """Put every candidate into entries or rejects.

    Candidates of one id and one uri are one sample with all their captions. Those of one id and
    several uris are one reject, "duplicate id": the store has one row for an id.
    """
    known: dict[str, Candidate] = {}
    for candidate in candidates:
        first = known.setdefault(candidate.id, candidate)
        if first is not candidate:
            _join(first, candidate)
    listing = Listing([], [])
    for id in sorted(known):
        candidate = known.pop(id)  # so that no two forms of all samples are held
        try:
            listing.entries.append(_checked(candidate))
        except BadMedia as bad:
            listing.rejects.append(_reject(candidate, bad))
    return listing


def printable(text: str) -> str:
    """The text with what is no Unicode escaped: names on a disk and in JSON can be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _reject(candidate: Candidate, bad: BadMedia) -> Reject:
    texts = (candidate.id, candidate.uri, bad.stage, bad.reason, bad.detail or candidate.origin)
    return Reject(*map(printable, texts))


def _join(first: Candidate, other: Candidate) -> None:
    if first.uri == other.uri:
        first.pairs.extend(other.pairs)
    else:
        first.fault = ("duplicate id", f"{first.uri} and {other.uri}")


def _checked(candidate: Candidate) -> MediaEntry:
    reason, detail = candidate.fault
    if reason:
        raise BadMedia("list", reason, detail)
    if printable(candidate.id + candidate.uri) != candidate.id + candidate.uri:
        raise BadMedia("list", "name is not UTF-8")
    if candidate.kind is None:
        raise BadMedia("list", "not an image or video")
    captions = weigh(candidate.pairs)
    return MediaEntry(
        candidate.id, candidate.uri, candidate.kind, captions, candidate.size, candidate.etag
    )
