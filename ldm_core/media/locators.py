"""Where the bytes of one picture or video are, as a text that travels to a worker.

A plain URI is a whole file; `x.tar#offset=512&size=1234` is a part of one; and
`x.parquet#row_group=0&row=12&column=image` is a cell of a Parquet file.
"""

import re
from collections import OrderedDict
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_core.errors import UserError
from ldm_core.files import filesystem

# Neither holds a dot, so that no file with the extension of a picture is mistaken for one.
_PART = re.compile(r"(.+)#offset=(\d+)&size=(\d+)", re.DOTALL)
_CELL = re.compile(r"(.+)#row_group=(\d+)&row=(\d+)&column=([\w%-]+)", re.DOTALL | re.ASCII)

_CellPlace = tuple[str, int, str]  # file, row group, column

ATTEMPTS = 2  # at a row group


class DamagedRowGroup(OSError):
    """A Parquet file still has the row group of which its footer tells, but not to be read."""


def member_uri(file: str, offset: int, size: int) -> str:
    """The locator of `size` bytes of a file."""
    return f"{file}#offset={offset}&size={size}"


def cell_uri(file: str, row_group: int, row: int, column: str) -> str:
    """The locator of a Parquet cell; `row` counts within its row group."""
    name = re.sub(r"[.~]", lambda sign: f"%{ord(sign[0]):02X}", quote(column, safe=""))
    return f"{file}#row_group={row_group}&row={row}&column={name}"


def cell_place(uri: str) -> tuple[str, int, int]:
    """File, row group and row of a Parquet cell, by which cells sort as they lie; else nothing."""
    cell = _CELL.fullmatch(uri)
    return (cell[1], int(cell[2]), int(cell[3])) if cell else ("", 0, 0)


def read_media(uri: str) -> bytes:
    """The bytes that a locator names, local or remote; see `MediaReader` for many of them.

    Raises:
        OSError: the file is not there, may not be read, or its server does not answer.
        UserError: the file has changed since it was listed.
    """
    return MediaReader().read(uri)


class MediaReader:
    """Reads the bytes that locators name; any number of threads may share one.

    A part of a file is one range request. Of Parquet files the last row groups are kept, the
    column of the media only, so that the rows of a group, read one after the other, are one
    request: read rows in the order in which they lie. Of one that cannot be read the error is kept
    for its other rows.
    """

    def __init__(self, row_groups: int = 2) -> None:
        self._kept = row_groups
        self._columns: OrderedDict[_CellPlace, pa.ChunkedArray] = OrderedDict()
        self._failed: dict[_CellPlace, list[OSError]] = {}
        self._again: set[_CellPlace] = set()
        self._lock = Lock()

    def read(self, uri: str) -> bytes:
        """The bytes of one picture or video; none for an empty cell.

        Raises:
            OSError: the file is not there, may not be read, or its server does not answer; or its
                row group is damaged (`DamagedRowGroup`).
            UserError: the file has changed since it was listed.
        """
        if part := _PART.fullmatch(uri):
            return _read_part(part[1], int(part[2]), int(part[3]))
        if cell := _CELL.fullmatch(uri):
            return self._read_cell(_place_of(cell), int(cell[3]))
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path))

    def head(self, uri: str, count: int) -> bytes:
        """At least the first `count` bytes of a picture or video, or all of it; raises as `read`
        does."""
        if part := _PART.fullmatch(uri):
            return _read_part(part[1], int(part[2]), min(int(part[3]), count))
        if _CELL.fullmatch(uri):
            return self.read(uri)
        fs, path = filesystem(uri)
        return bytes(fs.cat_file(path, start=0, end=count))

    def first_byte(self, uri: str) -> bytes:
        """Of the file in which a picture or video is, by which its storage shows that it answers;
        none of an empty file. Raises OSError as `read` does."""
        inside = _PART.fullmatch(uri) or _CELL.fullmatch(uri)
        fs, path = filesystem(inside[1] if inside else uri)
        return bytes(fs.cat_file(path, start=0, end=1))

    def try_again(self, uri: str) -> None:
        """Have a row group that could not be read be read once more for the next of its rows, but
        not more than `ATTEMPTS` times in all."""
        if cell := _CELL.fullmatch(uri):
            with self._lock:
                if len(self._failed.get(_place_of(cell), [])) < ATTEMPTS:
                    self._again.add(_place_of(cell))

    def _read_cell(self, place: _CellPlace, row: int) -> bytes:
        column = self._column(place)
        if row >= len(column):
            raise _changed(place[0])
        value: Any = column[row].as_py()
        return (value.get("bytes") if isinstance(value, dict) else value) or b""

    def _column(self, place: _CellPlace) -> pa.ChunkedArray:
        with self._lock:  # whoever wants the group that another reads waits for it
            if place not in self._columns:
                while len(self._columns) >= self._kept:
                    self._columns.popitem(last=False)
                self._columns[place] = self._attempt(place)
            self._columns.move_to_end(place)
            return self._columns[place]

    def _attempt(self, place: _CellPlace) -> pa.ChunkedArray:
        failed = self._failed.setdefault(place, [])
        if failed and place not in self._again:
            raise failed[-1].with_traceback(None)  # else it grows with every row
        self._again.discard(place)
        try:
            return _read_column(*place)
        except (ConnectionError, TimeoutError):  # of the server, not of the group
            raise
        except OSError as error:
            failed.append(error)
            raise


def _place_of(cell: re.Match[str]) -> _CellPlace:
    return cell[1], int(cell[2]), unquote(cell[4])


def _read_part(file: str, offset: int, size: int) -> bytes:
    if not size:
        return b""  # a range of no bytes cannot be asked for
    fs, path = filesystem(file)
    data = bytes(fs.cat_file(path, start=offset, end=offset + size))
    if len(data) != size:
        raise _changed(file)
    return data


def _read_column(file: str, row_group: int, column: str) -> pa.ChunkedArray:
    fs, path = filesystem(file)
    with fs.open(path, "rb", cache_type="none") as stream:
        try:
            parquet = pq.ParquetFile(stream)
            leaf = bytes_leaf(parquet.schema_arrow, column)
            rows = parquet.metadata.row_group(row_group).num_rows
        except (pa.ArrowException, KeyError, IndexError) as error:  # no such column, no such group
            raise _changed(file) from error
        return _decoded(parquet, row_group, leaf, rows)


def _decoded(parquet: pq.ParquetFile, row_group: int, leaf: str, rows: int) -> pa.ChunkedArray:
    try:
        column = parquet.read_row_group(row_group, columns=[leaf]).column(0)
    except (pa.ArrowException, OSError) as error:
        # what the storage raises passes as it is; Arrow's own OSErrors have no number
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):
            raise
        told = f"row group {row_group}: {type(error).__name__}: {error}"
        raise DamagedRowGroup(told) from error
    if len(column) != rows:
        raise DamagedRowGroup(f"row group {row_group} has {len(column)} of its {rows} rows")
    return column


def bytes_leaf(schema: pa.Schema, column: str) -> str:
    """The Parquet column of a cell's bytes: itself, or the "bytes" of a struct."""
    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def _changed(file: str) -> UserError:
    return UserError(f"{file} is not as it was listed: run the same command again")
