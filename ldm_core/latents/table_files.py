"""A table's Parquet files: listed, read in pieces, written, and put in the place of others."""

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.transaction import AddAction, RemoveAction

from ldm_core.files import filesystem, join, write_bytes
from ldm_core.latents.schema import TABLES

REPLACING = "replacing files"  # the transaction that all such commits number
# A row group is read as a whole: these bound a reader's memory, however large the file.
ROWS_PER_GROUP = 1024
BYTES_PER_GROUP = 64 * 2**20

_READ = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)


@dataclass(frozen=True)
class LiveFile:
    """A file of a table as its log has it; `path` is relative to the table's folder."""

    path: str
    bytes: int


def live_files(log: DeltaTable) -> list[LiveFile]:
    """The table's files, oldest first: rows that came together stay together."""
    actions = pa.table(log.get_add_actions()).sort_by(
        [("modification_time", "ascending"), ("path", "ascending")]
    )
    pairs = zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
    return [LiveFile(path, size) for path, size in pairs]


def dataset_of(uri: str, table: str, paths: Iterable[str]) -> pyarrow.dataset.Dataset:
    """Some files of the table in a store."""
    fs, root = filesystem(join(uri, table))
    whole = [join(root, path) for path in paths]
    return pyarrow.dataset.dataset(whole, schema=TABLES[table], format="parquet", filesystem=fs)


def read_pieces(uri: str, table: str, paths: Iterable[str]) -> Iterator[pa.RecordBatch]:
    """The rows of some files in their order, in pieces of up to a row group."""
    waiting: list[pa.RecordBatch] = []
    for batch in dataset_of(uri, table, paths).to_batches(
        batch_size=ROWS_PER_GROUP,
        batch_readahead=1,
        fragment_readahead=1,
        fragment_scan_options=_READ,
    ):
        waiting.append(batch)
        if (
            _sum(waiting, "num_rows") >= ROWS_PER_GROUP
            or _sum(waiting, "nbytes") >= BYTES_PER_GROUP
        ):
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def write_file(
    uri: str, table: str, kind: str, pieces: Iterable[pa.RecordBatch], data_change: bool
) -> AddAction | None:
    """Write rows as a file that no log names yet; None if there are no rows.

    Args:
        uri: of the store.
        table: name of the table.
        kind: what the file's name begins with.
        pieces: its rows.
        data_change: whether these rows are others than those of the files they replace.
    """
    sink, rows = pa.BufferOutputStream(), 0
    with pq.ParquetWriter(
        sink, TABLES[table], compression="zstd", write_page_checksum=True
    ) as writer:
        for piece in pieces:
            writer.write_batch(piece, row_group_size=_rows_per_group(piece))
            rows += piece.num_rows
    if not rows:
        return None
    data = sink.getvalue().to_pybytes()
    path = f"{kind}-{uuid.uuid4().hex[:16]}.parquet"
    write_bytes(join(uri, table, path), data)
    return AddAction(
        path=path,
        size=len(data),
        partition_values={},
        modification_time=int(time.time() * 1000),
        data_change=data_change,
        stats=json.dumps({"numRecords": rows}),
    )


def replace_files(
    log: DeltaTable,
    removed: Sequence[LiveFile],
    added: Sequence[AddAction],
    transaction: Transaction,
    data_change: bool,
) -> None:
    """Put files in the place of others, in one commit.

    Each such commit has the next number of one transaction, so that of two at a time the second is
    refused: delta-rs itself lets both remove a file, and each add what it made of it.

    Raises:
        DeltaError: somebody else replaced files since `log` was opened.
    """
    now = int(time.time() * 1000)
    turn = Transaction(REPLACING, (log.transaction_version(REPLACING) or 0) + 1)
    gone = [RemoveAction(file.path, data_change, now, file.bytes, {}) for file in removed]
    log.create_write_transaction(
        [*gone, *added],
        mode="append",
        schema=log.schema(),
        commit_properties=CommitProperties(app_transactions=[transaction, turn]),
    )


def _sum(batches: Sequence[pa.RecordBatch], name: str) -> int:
    return sum(getattr(batch, name) for batch in batches)


def _rows_per_group(batch: pa.RecordBatch) -> int:
    each = max(1, batch.nbytes // max(1, batch.num_rows))
    return max(1, min(ROWS_PER_GROUP, BYTES_PER_GROUP // each))
