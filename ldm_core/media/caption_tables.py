"""Tables of files and captions (JSON lines, CSV, Parquet), row by row."""

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_core.errors import UserError
from ldm_core.media.weighted_captions import Pair, caption_pairs

Row = dict[str, Any]  # value by role


@dataclass(frozen=True)
class Columns:
    """Names that a table's columns may have, by role, in order of preference; `*` matches.

    Every table has a caption; only some have a weight, or whatever else is optional.
    """

    needed: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]

    def choose(self, place: str, found: Iterable[str]) -> dict[str, str]:
        """Column by role.

        Raises:
            UserError: a role has no column; names `place`.
        """
        columns = list(found)
        chosen = {role: _first(names, columns) for role, names in self.needed.items()}
        for role, column in chosen.items():
            if column is None:
                raise UserError(
                    f"{place}: no {role} column; found {', '.join(map(str, columns)) or 'none'}, "
                    f"expected {' or '.join(self.needed[role])}"
                )
        chosen |= {role: _first(names, columns) for role, names in self.optional.items()}
        return {role: column for role, column in chosen.items() if column is not None}


CAPTION_COLUMNS = ("caption", "text", "captions")
FILE_NAME_COLUMNS = ("file_name", "image_file_name", "video_file_name", "*_file_name")
WEIGHT: dict[str, tuple[str, ...]] = {"weight": ("weight", "weights")}
_OURS = Columns(
    {"file": ("file", *FILE_NAME_COLUMNS, "image", "video"), "caption": CAPTION_COLUMNS}, WEIGHT
)
_IMAGEFOLDER = Columns(
    {"file": FILE_NAME_COLUMNS, "caption": ("text", "caption", "captions")}, WEIGHT
)
TABLE_COLUMNS = {
    "captions.jsonl": _OURS,
    "captions.csv": _OURS,
    "captions.parquet": _OURS,
    "metadata.jsonl": _IMAGEFOLDER,
    "metadata.csv": _IMAGEFOLDER,
    "metadata.parquet": _IMAGEFOLDER,
}


def read_table(name: str, data: bytes) -> dict[str, list[Pair]]:
    """Captions by file of the table called `name`; a file without any has an empty list.

    Files are POSIX paths relative to the table, normalised ("./a.png" is "a.png").

    Raises:
        UserError: not UTF-8, a malformed row, or columns missing; names the row.
    """
    captions: dict[str, list[Pair]] = {}
    for place, row in read_rows(name, data, TABLE_COLUMNS[posixpath.basename(name)]):
        file = row["file"]
        if not isinstance(file, str) or not file.strip():
            raise UserError(f"{place}: file is {file!r}; expected the path of a picture or video")
        pairs = captions.setdefault(posixpath.normpath(file.strip()), [])
        try:
            pairs.extend(caption_pairs(row["caption"], row.get("weight")))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
    return captions


def read_rows(name: str, data: bytes, columns: Columns) -> Iterator[tuple[str, Row]]:
    """The place ("a.csv:3") and the values by role of every row.

    Raises:
        UserError: not UTF-8, a malformed row, or columns missing; names the row.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    return readers[posixpath.splitext(name)[1].lower()](name, data, columns)


@contextmanager
def parquet_errors(name: str) -> Iterator[None]:
    """Say of which file it is when reading Parquet fails.

    Raises:
        UserError: the file is damaged or is no Parquet file.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a Parquet file that can be read: {error}") from error


def _first(names: tuple[str, ...], columns: list[str]) -> str | None:
    fitting = (column for name in names for column in columns if fnmatchcase(str(column), name))
    return next(fitting, None)


def _jsonl_rows(name: str, data: bytes, columns: Columns) -> Iterator[tuple[str, Row]]:
    known, chosen = None, {}
    for number, line in enumerate(_decode(name, data).split("\n"), start=1):
        if not line.strip():
            continue
        place, row = f"{name}:{number}", _json_object(f"{name}:{number}", line)
        if row.keys() != known:
            known, chosen = row.keys(), columns.choose(place, row)
        yield place, {role: row[column] for role, column in chosen.items()}


def _json_object(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error}); one object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: {row!r} is not a JSON object")
    return row


def _csv_rows(name: str, data: bytes, columns: Columns) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(_decode(name, data), newline=""), strict=True)
    try:
        chosen = columns.choose(f"{name}:1", reader.fieldnames or ())
        for row in reader:
            place = f"{name}:{reader.line_num}"
            if None in row:  # an unquoted comma would cut a caption short
                raise UserError(f"{place}: more fields than columns; quote captions with commas")
            # An empty cell is nothing: a weight that is not given, a caption that is not there.
            yield place, {role: row[column] or None for role, column in chosen.items()}
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not CSV ({error})") from error


def _parquet_rows(name: str, data: bytes, columns: Columns) -> Iterator[tuple[str, Row]]:
    with parquet_errors(name):
        file = pq.ParquetFile(io.BytesIO(data))
        chosen = columns.choose(name, file.schema_arrow.names)
        rows = file.read(columns=list(chosen.values())).to_pylist()
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", {role: row[column] for role, column in chosen.items()}


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # a spreadsheet's export begins with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error}): save it as UTF-8") from error
