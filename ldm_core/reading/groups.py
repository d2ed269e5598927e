"""Which row groups a table consists of at a Delta version, in arrays: a few bytes for each."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ldm_core.files import join
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.row_groups import Place, TableFiles, column_ranges

THREADS = 16  # waiting for footers, mostly

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Groups:
    """F files and G row groups.

    Attributes:
        uri: of the table's folder.
        paths: (F,) bytes, relative to it.
        sizes: (F,) int64, bytes.
        footers: (F,) int64, where each file's footer begins.
        file: (G,) int32.
        number: (G,) int32, of the row group in its file.
        rows: (G,) int32.
        spans: (G, 2) int64, where the columns of interest are in the file.
    """

    uri: str
    paths: np.ndarray
    sizes: np.ndarray
    footers: np.ndarray
    file: np.ndarray
    number: np.ndarray
    rows: np.ndarray
    spans: np.ndarray

    def __len__(self) -> int:
        return len(self.file)

    def place(self, group: int) -> Place:
        """Where a row group is."""
        file = int(self.file[group])
        start, end = map(int, self.spans[group])
        return Place(
            path=self.paths[file].decode(),
            bytes=int(self.sizes[file]),
            number=int(self.number[group]),
            span=(start, end),
            footer=int(self.footers[file]),
        )


def find_groups(
    version: StoreVersion,
    table: str,
    columns: Sequence[str],
    look: Callable[[TableFiles, Place, pq.FileMetaData], T],
) -> tuple[Groups, list[T]]:
    """The row groups of a version's table, and what `look` finds in each.

    Args:
        version: a published one.
        table: its name.
        columns: of interest later.
        look: called in threads, file by file.
    """
    uri = join(version.store.uri, table)
    log = version.store.open(table, version.manifest.tables[table])
    actions = pa.table(log.get_add_actions()).sort_by("path")
    paths, sizes = actions["path"].to_pylist(), actions["size_bytes"].to_pylist()
    files = TableFiles(uri)

    def visit(path: str, size: int) -> tuple[int, list[tuple[int, int, int, T]]]:
        footer = files.footer(path, size)
        begin = size - footer.serialized_size - 8
        return begin, [
            (*_span(footer, number, columns), footer.row_group(number).num_rows, found)
            for number, found in _each(files, path, size, footer, look)
        ]

    with ThreadPoolExecutor(THREADS, thread_name_prefix="index") as pool:
        visited = list(pool.map(visit, paths, sizes))
    found = [entry for _, entries in visited for entry in entries]
    counts = [len(entries) for _, entries in visited]
    groups = Groups(
        uri=uri,
        paths=np.array([path.encode() for path in paths], dtype=np.bytes_),
        sizes=np.array(sizes, dtype=np.int64),
        footers=np.array([begin for begin, _ in visited], dtype=np.int64),
        file=np.repeat(np.arange(len(paths), dtype=np.int32), counts),
        number=np.array([k for count in counts for k in range(count)], dtype=np.int32),
        rows=np.array([rows for _, _, rows, _ in found], dtype=np.int32),
        spans=np.array([entry[:2] for entry in found], dtype=np.int64).reshape(-1, 2),
    )
    return groups, [each for *_, each in found]


def _each(
    files: TableFiles,
    path: str,
    size: int,
    footer: pq.FileMetaData,
    look: Callable[[TableFiles, Place, pq.FileMetaData], T],
) -> Iterator[tuple[int, T]]:
    for number in range(footer.num_row_groups):
        yield number, look(files, Place(path, size, number), footer)


def _span(footer: pq.FileMetaData, number: int, columns: Sequence[str]) -> tuple[int, int]:
    ranges = list(column_ranges(footer, number, columns))
    return min(start for start, _ in ranges), max(end for _, end in ranges)
