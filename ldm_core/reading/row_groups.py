"""Row groups of Parquet files, read in few requests: some columns, checksums verified.

On an object store a row group costs one request if its file was met before, or two side by side,
the other for the footer, and one again where the two lie close together. Local files are left to
Arrow.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_core.errors import UserError
from ldm_core.files import filesystem, is_remote, join
from ldm_core.reading.byte_cache import ByteCache

_GAP = 256 * 2**10  # bytes that are sooner read than asked for twice
_TAIL = 64 * 2**10  # has the footer of a file of a few row groups
_FOOTERS = 32 * 2**20  # bytes of footers kept

# That a training waits for an object store: about as long as for one that is to take a checkpoint.
PATIENCE_S = 400.0

Range = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """A row group: where it is, and where its columns of interest and the footer are in the file.

    Attributes:
        path: relative to the table's folder.
        bytes: of the file.
        number: of the row group in it.
        span: of the columns of interest; (0, 0) if nobody looked.
        footer: where it begins.
    """

    path: str
    bytes: int
    number: int
    span: Range = (0, 0)
    footer: int = 0


class TableFiles:
    """The Parquet files under a table's folder; any number of threads may read.

    Args:
        patience_s: that a request outlasts an object store that is away; a warning tells of it.
            None is the file system's own patience, a minute.

    Attributes:
        uri: of the table's folder.
    """

    def __init__(self, uri: str, patience_s: float | None = None) -> None:
        self.uri = uri
        self._remote = is_remote(uri)
        self._fs, self._root = filesystem(uri, patience_s)
        self._footers: ByteCache[pq.FileMetaData] = ByteCache(_FOOTERS)

    def footer(self, path: str, size: int) -> pq.FileMetaData:
        """What a file of `size` bytes says of its row groups."""

        def load() -> tuple[pq.FileMetaData, int]:
            if not self._remote:
                return _with_bytes(pq.read_metadata(join(self._root, path)))
            (tail,) = self.fetch(path, [(max(0, size - _TAIL), size)])
            length = int.from_bytes(tail[-8:-4], "little") + 8  # as the format has it
            if length > len(tail):
                (tail,) = self.fetch(path, [(size - length, size)])
            return _parsed(tail)

        return self._footers.get(path, load)

    def read(self, place: Place, columns: Sequence[str]) -> pa.Table:
        """Some columns of a row group, in the table's order.

        Raises:
            OSError: the file is not there, not to be reached, or damaged.
        """
        known = self._footers.peek(place.path)
        if known is None and not (self._remote and place.footer):
            known = self.footer(place.path, place.bytes)
        source: str | _Pieces = join(self._root, place.path)
        if self._remote:
            source = self._fetched(place, known, columns)
        if known is None:
            assert isinstance(source, _Pieces)
            data = source.between(place.footer, place.bytes)
            known = self._footers.get(place.path, lambda: _parsed(data))
        file = pq.ParquetFile(
            source if isinstance(source, str) else pa.PythonFile(source, mode="r"),
            metadata=known,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        return file.read_row_group(place.number, columns=list(columns), use_threads=False)

    def fetch(self, path: str, ranges: Sequence[Range]) -> list[bytes]:
        """Bytes of a file on an object store, each range by a request of its own.

        Raises:
            OSError: the file is not there, not to be reached, or shorter than its log says.
        """
        whole = join(self._root, path)
        starts, ends = (list(each) for each in zip(*ranges, strict=True))
        found = self._fs.cat_ranges([whole] * len(ranges), starts, ends, on_error="return")
        for data, start, end in zip(found, starts, ends, strict=True):
            if isinstance(data, BaseException):
                raise data
            if len(data) != end - start:
                raise OSError(f"{self.uri}/{path} gave {len(data)} bytes from {start} to {end}")
        return found

    def _fetched(
        self, place: Place, footer: pq.FileMetaData | None, columns: Sequence[str]
    ) -> "_Pieces":
        """The columns, by the footer; without it what `place` says, and the footer."""
        ranges = [place.span, (place.footer, place.bytes)]
        if footer is not None:
            ranges = list(column_ranges(footer, place.number, columns))
        wanted = coalesced(ranges)
        pieces = zip(wanted, self.fetch(place.path, wanted), strict=True)
        return _Pieces(self, place, [(start, data) for (start, _), data in pieces])


def column_ranges(footer: pq.FileMetaData, number: int, columns: Sequence[str]) -> Iterator[Range]:
    """Where columns of a row group are in the file, those of nested ones each for itself."""
    group, wanted = footer.row_group(number), set(columns)
    for leaf in leaves(footer, wanted):
        chunk = group.column(leaf)
        start = chunk.data_page_offset
        if chunk.dictionary_page_offset:  # none is None or 0
            start = min(start, chunk.dictionary_page_offset)
        yield start, start + chunk.total_compressed_size


def leaves(footer: pq.FileMetaData, columns: Iterable[str]) -> list[int]:
    """Numbers of the columns' leaves, of which a nested column has several."""
    wanted, schema = set(columns), footer.schema
    names = (schema.column(k).path.partition(".")[0] for k in range(len(schema)))
    return [k for k, name in enumerate(names) if name in wanted]


def coalesced(ranges: Iterable[Range], gap: int = _GAP) -> list[Range]:
    """The ranges in order, those less than a gap apart as one."""
    result: list[Range] = []
    for start, end in sorted(ranges):
        if result and start - result[-1][1] <= gap:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def as_schema(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Columns with the types of the schema: other writers have other ones for the same values.

    Raises:
        UserError: a value that the schema's type cannot hold.
    """
    wanted = pa.schema([schema.field(name) for name in rows.column_names])
    if rows.schema.equals(wanted):
        return rows
    try:
        return rows.cast(wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise UserError(f"columns {rows.schema} of a store are not {wanted}: {error}") from error


class _Pieces:
    """A file of which some ranges are in memory, for Arrow to read; others are fetched when asked.

    `read_buffer` gives Arrow the bytes without a copy.
    """

    closed = False

    def __init__(self, files: TableFiles, place: Place, pieces: list[tuple[int, bytes]]) -> None:
        self._files, self._path, self._size = files, place.path, place.bytes
        self._pieces, self._place = pieces, 0

    def read_buffer(self, count: int = -1) -> pa.Buffer:
        start = self._place
        end = self._size if count < 0 else min(start + count, self._size)
        self._place = end
        return pa.py_buffer(self.between(start, end))

    def read(self, count: int = -1) -> bytes:
        return self.read_buffer(count).to_pybytes()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = (0, self._place, self._size)[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def size(self) -> int:
        return self._size

    def close(self) -> None:
        self.closed = True

    def flush(self) -> None:
        pass

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def between(self, start: int, end: int) -> memoryview:
        for first, data in self._pieces:
            if first <= start and end <= first + len(data):
                return memoryview(data)[start - first : end - first]
        (data,) = self._files.fetch(self._path, [(start, end)])
        return memoryview(data)


def _parsed(tail: bytes | memoryview) -> tuple[pq.FileMetaData, int]:
    """The footer of a file's last bytes, which hold all of it: Arrow takes them for a file."""
    return _with_bytes(pq.read_metadata(pa.BufferReader(pa.py_buffer(tail))))


def _with_bytes(footer: pq.FileMetaData) -> tuple[pq.FileMetaData, int]:
    return footer, int(footer.serialized_size)
