"""Rows of a table removed or changed, all in one commit; only files that hold any are written anew.

delta-rs' `merge` is not used: it joins the whole table in memory, latents and all, for one row.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import Transaction

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

    Memory: that of the keys, and of the largest file with such a row.

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
        log, uri = self.store.open(self.table), self.store.uri
        if log.transaction_version(self.name):
            return
        files = live_files(log)
        rows, found = self._count([file.path for file in files])
        removed = [file for file in files if found[file.path]]
        left = [f for f in removed if self.keeps or found[f.path] < rows[f.path]]
        written = [write_file(uri, self.table, NAME, self._pieces(f.path), True) for f in left]
        if removed:
            added = [file for file in written if file]
            replace_files(log, removed, added, Transaction(self.name, 1), True)

    def _count(self, paths: list[str]) -> tuple[Counter[str], Counter[str]]:
        """Of each file, its rows and those that have the keys; reads no other column."""
        rows, found = Counter[str](), Counter[str]()
        folder = filesystem(join(self.store.uri, self.table))[1].rstrip("/")
        names = self.keys.column_names
        for batch in dataset_of(self.store.uri, self.table, paths).to_batches([*names, _FILE]):
            hit = batch[_FILE].filter(pc.is_valid(self._places(batch)))
            rows.update(_counts(batch[_FILE], folder))
            found.update(_counts(hit, folder))
        return rows, found

    def _places(self, rows: pa.RecordBatch) -> pa.Array:
        names = self.keys.column_names
        return pc.index_in(_joined(rows.select(names)), _joined(self.keys).combine_chunks())

    def _pieces(self, path: str) -> Iterator[pa.RecordBatch]:
        for piece in read_pieces(self.store.uri, self.table, [path]):
            yield self.change(piece, self._places(piece))


def _joined(keys: pa.Table | pa.RecordBatch) -> pa.Array:
    """A text a row; columns of the tables' keys have no zero bytes."""
    return pc.binary_join_element_wise(*keys.columns, "\0")


def _counts(paths: pa.Array, folder: str) -> dict[str, int]:
    """How often each path comes, relative to the folder."""
    each = pc.value_counts(paths).to_pylist()
    return {one["values"].removeprefix(f"{folder}/"): one["counts"] for one in each}
