"""Rows of a table removed or changed, all in one commit; only files that hold any are written anew.

delta-rs' `merge` is not used: it joins the whole table in memory, latents and all, for one row.
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import Transaction
from deltalake.transaction import AddAction

from ldm_core.files import filesystem, join
from ldm_core.latents.commit import retry
from ldm_core.latents.store import LatentStore
from ldm_core.latents.table_files import (
    dataset_of,
    live_files,
    read_pieces,
    replace_files,
    write_file,
)

NAME = "rewrite"  # what such files' names begin with
_FILE = "__filename"  # pyarrow's column of the file that a row is from

Change = Callable[[pa.RecordBatch, pa.Array], pa.RecordBatch]
"""(rows, the place of each among the keys or null) -> what becomes of them."""


def delete_rows(store: LatentStore, table: str, keys: pa.Table) -> None:
    """Remove the rows whose columns equal a row of `keys`; published versions keep theirs.

    Memory: that of these columns of all rows, and of the largest file with such a row.

    Raises:
        CommitFailed: the storage did not answer, or others removed the same files each time.
    """

    def without(rows: pa.RecordBatch, at: pa.Array) -> pa.RecordBatch:
        return rows.filter(pc.is_null(at))

    if keys.num_rows:
        rewrite = _Rewrite(store, table, keys, without, keeps=False)
        retry(f"delete {keys.num_rows} rows of {table} in {store.uri}", rewrite.attempt)


def replace_rows(store: LatentStore, table: str, rows: pa.Table) -> None:
    """Give the rows whose id is in `rows` its other columns.

    Memory and errors are those of `delete_rows`.
    """

    def with_new(old: pa.RecordBatch, at: pa.Array) -> pa.RecordBatch:
        for name in rows.column_names:
            new = rows[name].combine_chunks().take(at)
            values = pc.if_else(pc.is_valid(at), new, old[name])
            place = old.schema.get_field_index(name)
            old = old.set_column(place, old.schema.field(name), values)
        return old

    if rows.num_rows:
        rewrite = _Rewrite(store, table, rows.select(["id"]), with_new, keeps=True)
        retry(f"replace {rows.num_rows} rows of {table} in {store.uri}", rewrite.attempt)


@dataclass(frozen=True)
class _Rewrite:
    """A change of the rows that have these keys; `keeps` says that they are still rows after it."""

    store: LatentStore
    table: str
    keys: pa.Table
    change: Change
    keeps: bool
    name: str = field(default_factory=lambda: f"{NAME}-{uuid.uuid4().hex}")

    def attempt(self) -> None:
        """Safe to repeat: a commit that was acknowledged too late is found in the log."""
        log = self.store.open(self.table)
        if log.transaction_version(self.name):
            return
        files = live_files(log)
        places = self._places([file.path for file in files])
        removed = [file for file in files if _hits(places.get(file.path))]
        added = [self._written(file.path, places[file.path]) for file in removed]
        if removed:
            done = [file for file in added if file]
            replace_files(log, removed, done, Transaction(self.name, 1), True)

    def _places(self, paths: list[str]) -> dict[str, pa.Array]:
        """Of each row of each file, in its order, the place of its keys or null; no other column is
        read, and all are looked up at once."""
        names = self.keys.column_names
        rows = dataset_of(self.store.uri, self.table, paths).to_table([*names, _FILE])
        places = pc.index_in(_joined(rows.select(names)), _joined(self.keys)).combine_chunks()
        folder = filesystem(join(self.store.uri, self.table))[1].rstrip("/")
        found, start = dict[str, pa.Array](), 0
        for one in pc.value_counts(rows[_FILE]).to_pylist():  # a file's rows come together
            found[one["values"].removeprefix(f"{folder}/")] = places.slice(start, one["counts"])
            start += one["counts"]
        return found

    def _written(self, path: str, places: pa.Array) -> AddAction | None:
        """What the file becomes; None, without reading it, if that is nothing."""
        if not self.keeps and places.null_count == 0:
            return None
        pieces = self._changed(path, places)
        return write_file(self.store.uri, self.table, NAME, pieces, True)

    def _changed(self, path: str, places: pa.Array) -> Iterator[pa.RecordBatch]:
        start = 0
        for piece in read_pieces(self.store.uri, self.table, [path]):
            yield self.change(piece, places.slice(start, piece.num_rows))
            start += piece.num_rows
        assert start == len(places), f"{path} has {start} rows, and had {len(places)}"


def _hits(places: pa.Array | None) -> bool:
    return places is not None and places.null_count < len(places)


def _joined(keys: pa.Table) -> pa.ChunkedArray:
    """A text a row; columns of the tables' keys have no zero bytes."""
    return pc.binary_join_element_wise(*keys.columns, "\0")
