"""The members of a tar archive, located without being read: name, offset, size.

Python's own `tarfile` trusts an archive: it reads headers of any length into memory, follows
offsets that lead back, and takes damage in the middle for the end. Archives are made by strangers
and a listing has to be whole, so this reads what pictures are shipped in (ustar, pax and GNU
headers), never moves but forward, and says where it had to stop.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ldm_core.errors import BadMedia

BLOCK = 512
LONGEST_HEADER = 1 << 20  # bytes of an extended header; names are far shorter
_REGULAR, _FOLDER, _WITHOUT_CONTENT = b"07\0", b"5", b"123456"
_GLOBAL, _PAX, _LONG_NAME, _LONG_LINK = b"g", b"xX", b"L", b"K"
_EXTENDED = _GLOBAL + _PAX + _LONG_NAME + _LONG_LINK


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive, or what stands for one.

    Attributes:
        name: as it is written; nothing has checked where it would lead.
        offset: of the first byte of its content.
        size: bytes of its content.
        is_plain: whether those bytes are the file: not so for links, devices and sparse files.
    """

    name: str
    offset: int
    size: int
    is_plain: bool


@dataclass(frozen=True, slots=True)
class _Header:
    kind: bytes
    name: str
    offset: int  # of the content that follows
    size: int


def read_members(archive: BinaryIO) -> Iterator[Member]:
    """The members in order, but folders; reads headers only.

    Raises:
        BadMedia: stage "list"; reason "truncated archive" or "damaged archive". What was yielded
            before is whole.
    """
    length = archive.seek(0, os.SEEK_END)
    position, told = 0, dict[str, str]()  # `told`: what extended headers say of the next member
    while (header := _header(archive, position)) is not None:
        extended = header.kind in _EXTENDED
        size = header.size if extended else int(told.get("size", header.size))
        position = header.offset + -(-size // BLOCK) * BLOCK
        if header.offset + size > length:
            detail = f"{header.name!r} ends at {header.offset + size}, the archive at {length}"
            raise BadMedia("list", "truncated archive", detail)
        if extended:
            told |= _extended(archive, header)
            continue
        name = told.get("path") or header.name
        if header.kind not in _FOLDER and not (header.kind == b"\0" and name.endswith("/")):
            plain = header.kind in _REGULAR and "sparse" not in told
            yield Member(name, header.offset, size, plain)
        told = {}


def _header(archive: BinaryIO, position: int) -> _Header | None:
    """The header at `position`; None for the mark at an archive's end."""
    archive.seek(position)
    block = archive.read(BLOCK)
    if len(block) < BLOCK:
        raise BadMedia("list", "truncated archive", f"no end mark at byte {position}")
    if not any(block):
        return None
    # A header's own sum counts the field that holds it as spaces.
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != _number(block[148:156], position):
        raise _damaged(position, f"no tar header but {block[:8]!r}")
    kind, size = block[156:157], _number(block[124:136], position)
    name = _text(block[:100])
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return _Header(
        kind=kind,
        name=f"{prefix}/{name}" if prefix else name,
        offset=position + BLOCK,
        size=0 if kind in _WITHOUT_CONTENT else size,
    )


def _extended(archive: BinaryIO, header: _Header) -> dict[str, str]:
    """What a pax or GNU header tells of the next member: path, size, whether it is sparse."""
    if header.size > LONGEST_HEADER:
        raise _damaged(header.offset, f"an extended header of {header.size} bytes")
    archive.seek(header.offset)
    data = archive.read(header.size)
    if header.kind in _LONG_NAME:
        return {"path": _text(data)}
    return dict(_pax_records(data, header.offset)) if header.kind in _PAX else {}


def _pax_records(data: bytes, position: int) -> Iterator[tuple[str, str]]:
    """The records "LENGTH KEY=VALUE\\n" that matter here; LENGTH counts the whole record."""
    start = 0
    while start < len(data) and data[start]:
        digits, _, _ = data[start : start + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = data[start + len(digits) + 1 : start + length]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if not equals or (key == b"size" and not (value.isdigit() and len(value) < 20)):
            raise _damaged(position + start, f"no pax record but {data[start : start + 8]!r}")
        if key in (b"path", b"size"):
            yield key.decode(), value.decode("utf-8", "backslashreplace")
        elif key.startswith(b"GNU.sparse."):
            yield "sparse", ""
        start += length


def _number(field: bytes, position: int) -> int:
    """An octal number, or the binary one that GNU tar writes where octal digits do not suffice."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not set(digits) <= set(b"01234567"):
        raise _damaged(position, f"{field!r} for a number")
    return int(digits or b"0", 8)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _damaged(position: int, what: str) -> BadMedia:
    return BadMedia("list", "damaged archive", f"at byte {position}: {what}")
