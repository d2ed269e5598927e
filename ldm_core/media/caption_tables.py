"""Caption tables (JSON lines, CSV, Parquet) -> captions by file."""

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_core.errors import UserError

# Table -> (names its file column may have, names its caption column may have), in order.
_OURS = (("file", "file_name", "image"), ("caption", "text", "captions"))
_IMAGEFOLDER = (("file_name",), ("text", "caption"))
TABLE_COLUMNS = {
    "captions.jsonl": _OURS,
    "captions.csv": _OURS,
    "captions.parquet": _OURS,
    "metadata.jsonl": _IMAGEFOLDER,
    "metadata.csv": _IMAGEFOLDER,
}


def read_table(name: str, data: bytes) -> dict[str, tuple[str, ...]]:
    """Captions by file of the table called `name`; a file without any has an empty tuple.

    Files are relative POSIX paths, normalised ("./a.png" is "a.png").

    Raises:
        UserError: not UTF-8, a malformed row, or columns missing; names the row.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    rows = readers[posixpath.splitext(name)[1]](name, data)
    captions: dict[str, tuple[str, ...]] = {}
    for place, row in rows:
        file_column, caption_column = _columns(name, place, row.keys())
        file = row[file_column]
        if not isinstance(file, str) or not file.strip():
            raise UserError(f"{place}: {file_column} is {file!r}; expected a picture's path")
        file = posixpath.normpath(file.strip())
        texts = _texts(place, caption_column, row[caption_column])
        captions[file] = clean([*captions.get(file, ()), *texts])
    return captions


def clean(texts: Iterable[str]) -> tuple[str, ...]:
    """Captions with white space collapsed, without empty ones and repeats, in order."""
    return tuple(dict.fromkeys(text for text in (" ".join(t.split()) for t in texts) if text))


def _columns(name: str, place: str, columns: Iterable[str]) -> tuple[str, str]:
    found = list(columns)
    chosen = []
    for what, names in zip(("file", "caption"), TABLE_COLUMNS[name], strict=True):
        present = [column for column in names if column in found]
        if not present:
            raise UserError(
                f"{place}: no {what} column; found {', '.join(map(str, found)) or 'none'}, "
                f"expected {' or '.join(names)}"
            )
        chosen.append(present[0])
    return chosen[0], chosen[1]


def _texts(place: str, column: str, value: Any) -> list[str]:
    """A caption cell as a list: text, a list of texts, or nothing."""
    texts = value if isinstance(value, list) else [value]
    texts = [text for text in texts if text is not None]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{place}: {column} is {value!r}; expected text or a list of texts")
    return texts


def _jsonl_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_decode(name, data).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}:{number}: not JSON ({error}); one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{name}:{number}: {row!r} is not a JSON object")
        yield f"{name}:{number}", row


def _csv_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_decode(name, data), newline=""), strict=True)
    _columns(name, f"{name}:1", reader.fieldnames or ())  # a table without rows is checked too
    try:
        for row in reader:
            yield f"{name}:{reader.line_num}", _whole_row(name, reader.line_num, row)
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not CSV ({error})") from error


def _whole_row(name: str, line: int, row: dict[str | None, Any]) -> dict[str, Any]:
    """A row with as many fields as the header; an unquoted comma would cut a caption short."""
    if None in row:
        raise UserError(f"{name}:{line}: more fields than columns; quote captions with commas")
    return {str(key): value for key, value in row.items()}


def _parquet_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
    except pa.ArrowException as error:
        raise UserError(f"{name} is not a Parquet file: {error}") from error
    columns = _columns(name, name, file.schema_arrow.names)
    rows = file.read(columns=list(columns)).to_pylist()
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", row


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # a spreadsheet's export begins with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error}): save it as UTF-8") from error
