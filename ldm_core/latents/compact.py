"""Many small Parquet files of a table into fewer large ones: other files, the same rows.

delta-rs' own `optimize.compact` is not used: two of them at a time both commit, and every row is
there twice. Here each compaction carries an application transaction like any other commit, so the
second of two is refused; appends go on beside it, and a deletion makes it start anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltalake import DeltaTable, Transaction
from deltalake.transaction import AddAction

from ldm_core.latents.card import write_card
from ldm_core.latents.commit import retry
from ldm_core.latents.difference import difference
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.table_files import (
    LiveFile,
    live_files,
    read_pieces,
    replace_files,
    write_file,
)

TRANSACTION = "compaction"


@dataclass(frozen=True)
class Compaction:
    """A table's files before and after."""

    table: str
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int


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
    before = live_files(store.open(table))
    number = (store.open(table).transaction_version(TRANSACTION) or 0) + 1

    def attempt() -> None:
        log = store.open(table)
        if (log.transaction_version(TRANSACTION) or 0) >= number:
            return  # acknowledged too late, or another's
        if groups := _groups(live_files(log), target_bytes):
            _replace(store, table, log, groups, number)

    retry(f"compact {table} of {store.uri}", attempt)
    after = live_files(store.open(table))
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


def _groups(files: Sequence[LiveFile], target_bytes: int) -> list[list[LiveFile]]:
    """Small files in groups of at most the target, of two or more each."""
    groups: list[list[LiveFile]] = [[]]
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
    store: LatentStore,
    table: str,
    log: DeltaTable,
    groups: Sequence[Sequence[LiveFile]],
    number: int,
) -> None:
    """Write a file for each group, and commit it all in the old ones' place."""
    removed = [file for group in groups for file in group]
    added = [_merged(store, table, group) for group in groups]
    transaction = Transaction(TRANSACTION, number)
    replace_files(log, removed, [file for file in added if file], transaction, False)


def _merged(store: LatentStore, table: str, group: Sequence[LiveFile]) -> AddAction | None:
    """One file with the rows of several, in their order."""
    pieces = read_pieces(store.uri, table, [file.path for file in group])
    return write_file(store.uri, table, TRANSACTION, pieces, False)
