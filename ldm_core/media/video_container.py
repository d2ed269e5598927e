"""Which container a video file is, by its own bytes, and whether the file is all there."""

import re
from collections.abc import Callable

from ldm_core.errors import BadMedia


def check_container(data: bytes) -> str:
    """The container of a whole file's bytes: "mp4" (also mov), "matroska" (also webm) or "avi".

    The file's name is no evidence, and a parser that guessed would accept a playlist's text.

    Raises:
        BadMedia: "empty file", "not a video", or "truncated" where the file's own headers
            promise more bytes than there are.
    """
    if not data:
        raise BadMedia("decode", "empty file")
    for container, (beginning, promise) in _CONTAINERS.items():
        if beginning.match(data):
            if promise(data) > len(data):
                detail = f"{len(data)} bytes of at least {promise(data)}"
                raise BadMedia("decode", "truncated", detail)
            return container
    detail = f"begins with {data[:16]!r}; containers read: mp4, mov, webm, mkv, avi"
    raise BadMedia("decode", "not a video", detail)


_ISO_BOXES = {b"ftyp", b"styp", b"sidx", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide"}


def _iso_length(data: bytes) -> int:
    """Bytes an mp4 or mov needs by its outermost boxes: [size, type, ...], 32 or 64 bits."""
    place = 0
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if size == 1:
            size = max(16, int.from_bytes(data[place + 8 : place + 16]))
        if size < 8:  # 0: to the end of the file; others: no box
            return place
        if place + size > len(data) and kind not in _ISO_BOXES:
            return place  # bytes that a camera appended
        place += size
    return place


def _ebml_length(data: bytes) -> int:
    """Bytes a Matroska file needs by the size of its segment; a live recording has none."""
    header, place = _ebml_size(data, 4)
    segment, place = _ebml_size(data, place + header + 4)
    return place + segment


def _ebml_size(data: bytes, place: int) -> tuple[int, int]:
    """(an element's size, where its content begins); a size of all ones is unknown: 0."""
    if place >= len(data) or not data[place]:
        return 0, place + 1
    length = 9 - data[place].bit_length()
    ones = (1 << 7 * length) - 1
    size = int.from_bytes(data[place : place + length]) & ones
    return (0 if size == ones else size), place + length


def _riff_length(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


# Container -> (how its files begin, the bytes they need by their own headers).
_CONTAINERS: dict[str, tuple[re.Pattern[bytes], Callable[[bytes], int]]] = {
    "mp4": (re.compile(rb"(?s).{4}(ftyp|moov|mdat)|\0.{3}(free|skip|wide)"), _iso_length),
    "matroska": (re.compile(rb"\x1aE\xdf\xa3"), _ebml_length),
    "avi": (re.compile(rb"(?s)RIFF.{4}AVI "), _riff_length),
}
