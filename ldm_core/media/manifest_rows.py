"""The rows of a manifest: a table of media by URI, or of their bytes themselves (Parquet only)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_core.errors import UserError
from ldm_core.media.caption_tables import (
    CAPTION_COLUMNS,
    FILE_NAME_COLUMNS,
    WEIGHT,
    Columns,
    Row,
    parquet_errors,
    read_rows,
)
from ldm_core.media.entries import Kind, media_kind
from ldm_core.media.locators import bytes_leaf, cell_uri
from ldm_core.media.places import Place

# A worker holds a row group's media at once, and the one before it.
LARGEST_ROW_GROUP = 1 << 30
HEAD = 4 << 20  # bytes that are looked at of lines of which not all are wanted

_FILE = ("uri", "url", "file", *FILE_NAME_COLUMNS, "path", "image", "video")
_OPTIONAL = {**WEIGHT, "id": ("id",)}
_BY_URI = Columns({"file": _FILE, "caption": CAPTION_COLUMNS}, _OPTIONAL)
_BY_BYTES = Columns({"caption": CAPTION_COLUMNS}, {**_OPTIONAL, "file": _FILE})
_BYTES = Columns({}, {"bytes": ("bytes", "image", "video")})


@dataclass(slots=True)
class ManifestRow:
    """One row, as it is written.

    Attributes:
        place: names it, such as "a.jsonl:3" or "a.parquet/12".
        values: by role: "caption", and "file", "id", "weight" where there are such columns.
        cell: locator of its bytes, where the manifest itself has them.
        kind: of those bytes.
    """

    place: str
    values: Row
    cell: str | None = None
    kind: Kind | None = None


def manifest_rows(
    place: Place, id: str, some: Mapping[int, int] | None = None
) -> Iterator[ManifestRow]:
    """The rows of one manifest of a place; media in it are located, not read.

    Args:
        place: of the manifest.
        id: its name there.
        some: where not all are wanted: of Parquet row groups, and how many rows of each; of lines
            how many as group 0, no more than `head_rows` tells.

    Raises:
        UserError: it cannot be read, it lacks a column, or its row groups are too large.
    """
    if id.lower().endswith(".parquet"):
        yield from _parquet_rows(place, id, some)
    else:
        data, count = (place.read(id), None) if some is None else (_head(place, id), some[0])
        for row_place, values in islice(read_rows(id, data, _BY_URI), count):
            yield ManifestRow(row_place, values)


def head_rows(place: Place, id: str) -> tuple[int, int]:
    """How many rows a manifest of lines begins with, and of how many bytes, of at most `HEAD`."""
    data = _head(place, id)
    return sum(1 for _ in read_rows(id, data, _BY_URI)), len(data)


def _head(place: Place, id: str) -> bytes:
    """The first whole rows; a cell of CSV may have line ends between quotes."""
    data = bytes(place.fs.cat_file(place.files[id].path, end=HEAD))
    quoted = id.lower().endswith(".csv")
    size = end = quotes = 0
    for line in data.split(b"\n")[:-1]:
        size, quotes = size + len(line) + 1, quotes + line.count(b'"')
        end = end if quoted and quotes % 2 else size
    return data[:end]


def _parquet_rows(place: Place, id: str, some: Mapping[int, int] | None) -> Iterator[ManifestRow]:
    path, uri = place.files[id].path, place.uri(id)
    with place.fs.open(path, "rb", cache_type="none") as stream, parquet_errors(id):
        file = pq.ParquetFile(stream)
        inline = _inline_column(file.schema_arrow)
        texts = _text_columns(id, file.schema_arrow, inline)
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            wanted = count if some is None else min(count, some.get(group, 0))
            first += count
            if not wanted:
                continue
            stored = inline is not None and _stored(id, file, group, inline)
            rows = _first_rows(id, file, group, list(texts.values()), wanted)
            for number, row in enumerate(rows):
                found = ManifestRow(f"{id}/{first - count + number}", _by_role(texts, row))
                if stored and inline:
                    found.cell = cell_uri(uri, group, number, inline)
                    found.kind = _kind(inline, found.values.get("file"))
                yield found


def _first_rows(
    id: str, file: pq.ParquetFile, group: int, columns: list[str], count: int
) -> list[Row]:
    """So many rows of a group. Arrow ends a batch early where a text column reaches 2 GiB."""
    batches = file.iter_batches(count, row_groups=[group], columns=columns)
    rows = list(islice((row for batch in batches for row in batch.to_pylist()), count))
    if len(rows) != count:
        raise UserError(
            f"{id}: row group {group} should have {count} rows and {len(rows)} could be read: "
            "write the file anew"
        )
    return rows


def _inline_column(schema: pa.Schema) -> str | None:
    """The column that holds media, if one does: bytes, or a struct of bytes and path."""
    holding = [field.name for field in schema if _holds_bytes(field.type)]
    return _BYTES.choose("", holding).get("bytes")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind] and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _text_columns(id: str, schema: pa.Schema, inline: str | None) -> dict[str, str]:
    """Parquet columns by role, none of them with bytes."""
    names = [field.name for field in schema if not _holds_bytes(field.type)]
    if inline is None:
        return _BY_URI.choose(id, names)
    chosen = _BY_BYTES.choose(id, names)
    kind = schema.field(inline).type
    if pa.types.is_struct(kind) and "path" in [field.name for field in kind]:
        chosen["file"] = f"{inline}.path"
    return chosen


def _by_role(columns: dict[str, str], row: dict[str, Any]) -> Row:
    """The values of a row; "image.path" is read as a struct with nothing but a path."""
    values = {}
    for role, column in columns.items():
        outer, dot, inner = column.partition(".") if column not in row else (column, "", "")
        values[role] = (row[outer] or {}).get(inner) if dot else row[outer]
    return values


def _stored(id: str, file: pq.ParquetFile, group: int, inline: str) -> bool:
    """Whether a row group holds media: a writer may leave all of them out and give paths."""
    leaf, metadata = bytes_leaf(file.schema_arrow, inline), file.metadata.row_group(group)
    columns = map(metadata.column, range(metadata.num_columns))
    column = next(column for column in columns if column.path_in_schema == leaf)
    if column.total_uncompressed_size > LARGEST_ROW_GROUP:
        raise UserError(
            f"{id}: row group {group} holds {column.total_uncompressed_size} bytes of {inline}, "
            f"and a worker reads a group at once, {LARGEST_ROW_GROUP} at most: write it with "
            "smaller row groups, such as row_group_size=256"
        )
    known = column.is_stats_set and column.statistics.has_null_count
    return not (known and column.statistics.null_count == metadata.num_rows)


def _kind(inline: str, file: Any) -> Kind:
    named = media_kind(file) if isinstance(file, str) else None
    return named or ("video" if inline == "video" else "image")
