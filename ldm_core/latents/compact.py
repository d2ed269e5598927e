"""Many small Parquet files of a table into fewer large ones: other files, the same rows.

delta-rs' own `optimize.compact` is not used: two of them at a time both commit, and every row is
there twice. Here each compaction carries an application transaction like any other commit, so the
second of two is refused; appends go on beside it, and a deletion makes it start anew.
"""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.transaction import AddAction, RemoveAction

from ldm_core.files import filesystem, join, write_bytes
from ldm_core.latents.card import write_card
from ldm_core.latents.commit import retry
from ldm_core.latents.difference import difference
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore, StoreVersion

TRANSACTION = "compaction"
# A row group is read as a whole: these bound a reader's memory, however large the file.
ROWS_PER_GROUP = 1024
BYTES_PER_GROUP = 64 * 2**20

_READ = pyarrow.dataset.ParquetFragmentScanOptions(page_checksum_verification=True)


@dataclass(frozen=True)
class Compaction:
    """A table's files before and after."""

    table: str
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class _File:
    """A live file as the log has it."""

    path: str
    bytes: int


def compact(store: LatentStore, table: str, target_bytes: int) -> Compaction:
    """Rewrite files of less than half the target into files of about the target, in one commit.

    Writers may append meanwhile. Memory: about three times the target. What a kill or a conflict
    leaves behind was never committed, and goes with the next vacuum.

    Args:
        store: its published versions keep the files they have.
        table: name of the table.
        target_bytes: size of a large file.

    Raises:
        CommitFailed: the storage did not answer, or others deleted rows each time.
    """
    before = _live(store.open(table))
    number = (store.open(table).transaction_version(TRANSACTION) or 0) + 1

    def attempt() -> None:
        log = store.open(table)
        if (log.transaction_version(TRANSACTION) or 0) >= number:
            return  # acknowledged too late, or another's
        if groups := _groups(_live(log), target_bytes):
            _replace(store, table, log, groups, number)

    retry(f"compact {table} of {store.uri}", attempt)
    after = _live(store.open(table))
    sizes = (sum(file.bytes for file in files) for files in (before, after))
    return Compaction(table, len(before), len(after), *sizes)


def publish_compacted(store: LatentStore) -> int | None:
    """Publish the tables as they are if they hold what the newest version holds.

    Returns:
        The number of the version that pins the tables as they are now, new only if none did; None
        if the tables hold other rows, which their writer is to publish.
    """
    newest = store.open_version()
    tables = {name: store.open(name).version() for name in TABLES}
    if tables == newest.manifest.tables:
        return newest.number
    size = sum(store.bytes(name, version) for name, version in tables.items())
    update: dict[str, Any] = {"tables": tables, "bytes": size}
    now = StoreVersion(store, newest.manifest.model_copy(update=update))
    if _row_counts(now) != newest.manifest.counts or not difference(newest, now).none:
        return None
    number = store.publish(now.manifest)
    write_card(store, store.open_version(number).manifest)
    return number


def _row_counts(version: StoreVersion) -> dict[str, int]:
    pinned = version.manifest.tables
    return {name: version.store.dataset(name, pinned[name]).count_rows() for name in TABLES}


def _live(log: DeltaTable) -> list[_File]:
    """The table's files, oldest first: rows that came together stay together."""
    actions = pa.table(log.get_add_actions()).sort_by(
        [("modification_time", "ascending"), ("path", "ascending")]
    )
    pairs = zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), strict=True)
    return [_File(path, size) for path, size in pairs]


def _groups(files: Sequence[_File], target_bytes: int) -> list[list[_File]]:
    """Small files in groups of at most the target, of two or more each."""
    groups: list[list[_File]] = [[]]
    size = 0
    for file in files:
        if 2 * file.bytes >= target_bytes:
            continue
        if size + file.bytes > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.bytes
    return [group for group in groups if len(group) > 1]


def _replace(
    store: LatentStore, table: str, log: DeltaTable, groups: Sequence[Sequence[_File]], number: int
) -> None:
    """Write a file for each group, and commit it all in the old ones' place."""
    now = int(time.time() * 1000)
    removed = [RemoveAction(file.path, False, now, file.bytes, {}) for g in groups for file in g]
    added = [_merged(store, table, group) for group in groups]
    log.create_write_transaction(
        [*removed, *added],
        mode="append",
        schema=log.schema(),
        commit_properties=CommitProperties(app_transactions=[Transaction(TRANSACTION, number)]),
    )


def _merged(store: LatentStore, table: str, group: Sequence[_File]) -> AddAction:
    """One file with the rows of several, in their order."""
    sink = pa.BufferOutputStream()
    rows = 0
    with pq.ParquetWriter(
        sink, TABLES[table], compression="zstd", write_page_checksum=True
    ) as writer:
        for batch in _batches(store, table, group):
            writer.write_batch(batch, row_group_size=_rows_per_group(batch))
            rows += batch.num_rows
    data = sink.getvalue().to_pybytes()
    path = f"{TRANSACTION}-{uuid.uuid4().hex[:16]}.parquet"
    write_bytes(join(store.uri, table, path), data)
    return AddAction(
        path=path,
        size=len(data),
        partition_values={},
        modification_time=int(time.time() * 1000),
        data_change=False,
        stats=json.dumps({"numRecords": rows}),
    )


def _batches(store: LatentStore, table: str, group: Sequence[_File]) -> Iterator[pa.RecordBatch]:
    """The rows of some files, in pieces of up to a row group."""
    fs, root = filesystem(join(store.uri, table))
    paths = [join(root, file.path) for file in group]
    dataset = pyarrow.dataset.dataset(paths, schema=TABLES[table], format="parquet", filesystem=fs)
    waiting: list[pa.RecordBatch] = []
    for batch in dataset.to_batches(
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


def _sum(batches: Sequence[pa.RecordBatch], name: str) -> int:
    return sum(getattr(batch, name) for batch in batches)


def _rows_per_group(batch: pa.RecordBatch) -> int:
    each = max(1, batch.nbytes // max(1, batch.num_rows))
    return max(1, min(ROWS_PER_GROUP, BYTES_PER_GROUP // each))
