"""Removing the files that no kept version of a store needs.

delta-rs' own vacuum knows nothing of published versions, each of which pins an old state of the
tables. So the files are chosen here, and the Delta logs are left alone: they are small, and every
version is opened through them.

Whenever it is killed, a published version that is listed has all its files: versions are
unpublished first, and of the files only those go which neither a kept version nor the tables'
present state has. Nobody may write to the store meanwhile: whoever calls this holds its lock.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from ldm_core.errors import UserError
from ldm_core.files import filesystem, join, remove
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore


@dataclass(frozen=True)
class DataFile:
    """A file in a table's folder; `path` is relative to the table."""

    table: str
    path: str
    bytes: int


@dataclass(frozen=True)
class VacuumPlan:
    """What is to go and what is not.

    Attributes:
        kept: versions that stay.
        versions: versions to unpublish, oldest first.
        superseded: files that only unpublished versions had, or none.
        abandoned: files that were never committed, left by jobs that ended before.
        young: files never committed that a running job may still commit: they stay.
    """

    kept: tuple[int, ...]
    versions: tuple[int, ...]
    superseded: tuple[DataFile, ...]
    abandoned: tuple[DataFile, ...]
    young: tuple[DataFile, ...]

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files to remove."""
        return self.superseded + self.abandoned


def plan_vacuum(store: LatentStore, keep: int = 3, older_than_hours: float = 24.0) -> VacuumPlan:
    """Choose what can go.

    Args:
        store: with at least one published version.
        keep: how many of the newest versions stay, at least 1.
        older_than_hours: how long ago an uncommitted file must have been written to count as
            abandoned: longer than a job takes from writing a shard to committing it.

    Raises:
        UserError: `keep` below 1, a negative age, nothing published, or a kept version that this
            program cannot read.
    """
    if keep < 1 or older_than_hours < 0:
        raise UserError(
            f"keep {keep} versions and files of {older_than_hours:g} hours: keep at least 1, and "
            "give an age of 0 hours or more"
        )
    store.open_version()  # says so if nothing is published
    numbers = store.versions()
    kept = numbers[-keep:]
    pinned = [store.open_version(number).manifest.tables for number in kept]
    superseded: list[DataFile] = []
    uncommitted: list[tuple[DataFile, datetime]] = []
    for table in TABLES:
        listed = list(_listed(store, table))  # first, so that what is committed later is not here
        committed = _ever_committed(store, table)
        needed = _live(store, table, None)
        for versions in pinned:
            needed |= _live(store, table, versions[table])
        free = [(file, written) for file, written in listed if file.path not in needed]
        superseded += [file for file, _ in free if file.path in committed]
        uncommitted += [each for each in free if each[0].path not in committed]
    limit = datetime.now(UTC) - timedelta(hours=older_than_hours)
    return VacuumPlan(
        kept=tuple(kept),
        versions=tuple(numbers[:-keep]),
        superseded=tuple(superseded),
        abandoned=tuple(file for file, written in uncommitted if written <= limit),
        young=tuple(file for file, written in uncommitted if written > limit),
    )


def vacuum(
    store: LatentStore, plan: VacuumPlan, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Do what was planned: the versions first, then the files; what is gone already is fine.

    Raises:
        UserError: another job published a version since it was planned.
    """
    newest = store.versions()[-1:]
    if newest != list(plan.kept[-1:]):
        raise UserError(
            f"{store.uri} has a new version {newest} since this began: a job is writing it. Run "
            "the same command again when it has ended"
        )
    for number in plan.versions:
        remove(join(store.uri, "versions", f"{number:08d}.json"))
    for done, file in enumerate(plan.files, start=1):
        remove(join(store.uri, file.table, file.path))
        progress(done)


def _listed(store: LatentStore, table: str) -> Iterator[tuple[DataFile, datetime]]:
    """The files in a table's folder, with the time each was written."""
    fs, root = filesystem(join(store.uri, table))
    for each in fs.ls(root, detail=True):
        if each["type"] == "file":
            path = each["name"].rsplit("/", 1)[-1]
            yield DataFile(table, path, int(each["size"])), _written(each)


def _written(listed: dict[str, Any]) -> datetime:
    """When a listed file was written: S3 and local disks have a name of their own for it."""
    time = listed.get("LastModified", listed.get("mtime"))
    if time is None:  # where nobody knows, it may have been just now
        return datetime.now(UTC)
    return time if isinstance(time, datetime) else datetime.fromtimestamp(time, UTC)


def _live(store: LatentStore, table: str, version: int | None) -> set[str]:
    """Paths of a snapshot's files."""
    return set(pa.table(store.open(table, version).get_add_actions())["path"].to_pylist())


def _ever_committed(store: LatentStore, table: str) -> set[str]:
    """Paths of all files that a commit ever added."""
    fs, folder = filesystem(join(store.uri, table, "_delta_log"))
    paths = [path for path in fs.ls(folder, detail=False) if path.endswith(".json")]
    commits = (data.splitlines() for data in fs.cat(paths).values())
    actions = (json.loads(line) for lines in commits for line in lines)
    return {action["add"]["path"] for action in actions if "add" in action}
