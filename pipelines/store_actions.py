"""What `ldm store` does and prints."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from ldm_core.autoencoders.autoencoder import AutoencoderFacts, autoencoder_facts
from ldm_core.errors import UserError
from ldm_core.latents.compact import Compaction, compact, publish_compacted
from ldm_core.latents.difference import Changes, difference
from ldm_core.latents.lock import locked
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.tally import Check
from ldm_core.latents.vacuum import DataFile, VacuumPlan, plan_vacuum, vacuum
from ldm_core.latents.verify import verify
from pipelines.credentials import masked
from pipelines.exit_codes import JobFailed
from pipelines.progress import Progress
from pipelines.store_view import print_version, print_versions
from pipelines.text_tables import Cell, byte_size, print_table

SHOWN = 5


def show_store(uri: str, number: int | None) -> None:
    """List the versions, and what is in one of them.

    Raises:
        UserError: nothing published there, or not this version.
    """
    store = LatentStore(uri)
    version = store.open_version(number)
    print_versions(store)
    print_version(version)
    _next(uri, "--version", str(version.number), "--verify")


def verify_version(uri: str, number: int | None, preview: str | None) -> None:
    """Check a version row by row; with `preview`, decode some of it into this PNG.

    Raises:
        UserError: nothing published there, not this version, or a preview that cannot be made.
        JobFailed: a check failed.
    """
    version = LatentStore(uri).open_version(number)
    if preview is not None and not preview.lower().endswith(".png"):
        raise UserError(f"--preview {preview}: end it in .png")
    counts = version.manifest.counts
    with Progress("verify", sum(counts.values()), "rows") as bar:
        checks = verify(version, _facts(version), bar.update)
    for line in _check_lines(checks):
        print(line, flush=True)
    failed = [check for check in checks if check.failed]
    if failed:
        raise JobFailed(_remedy(version, len(failed), len(checks)))
    print(f"version {version.number} of {masked(version.store.uri)} holds: all of it was read")
    if preview is not None:
        from pipelines.store_preview import write_preview  # here: it loads an autoencoder

        print(f"{preview}: {write_preview(version, preview)}, decoded")
    _next(uri, "--vacuum", "--dry-run")


def show_difference(uri: str, first: int, second: int) -> None:
    """Say what the second of two versions changed of the first.

    Raises:
        UserError: nothing published there, or not these versions.
    """
    store = LatentStore(uri)
    found = difference(store.open_version(first), store.open_version(second))
    changed = Changes((), (), found.latents), Changes((), (), found.captions)
    named = {"samples": found.samples, "- latents": changed[0], "- captions": changed[1],
             "caption embeddings": found.texts, "rejects": found.rejects}  # fmt: skip
    rows: list[list[Cell]] = [
        [name, len(each.added), len(each.removed), len(each.changed)]
        for name, each in named.items()
    ]
    title = f"version {second} of {masked(store.uri)} against version {first}"
    print_table(title, ("", "added", "removed", "changed"), rows)
    for name, each in named.items():
        for what in ("added", "removed", "changed"):
            _list_some(f"{name.removeprefix('- ')} {what}", getattr(each, what))
    if found.none:
        print("the two hold the same")
    _next(uri, "--version", str(second), "--verify")


def vacuum_store(uri: str, keep: int, older_than: float, dry_run: bool) -> None:
    """Remove versions and files nobody needs, or say which.

    Raises:
        UserError: nothing published there, numbers out of range, or a job that is writing it.
    """
    store = LatentStore(uri)
    plan = plan_vacuum(store, keep, older_than)  # says what is wrong before a lock is written
    if dry_run:
        _tell_vacuum(store, plan, older_than, "would go")
        _next(uri, "--vacuum", "--keep", str(keep), "--older-than", f"{older_than:g}")
        return
    with locked(store.uri):  # what nobody had committed, a job that ended since may have
        plan = plan_vacuum(store, keep, older_than)
        _tell_vacuum(store, plan, older_than, "goes")
        with Progress("vacuum", len(plan.files), "files") as bar:
            vacuum(store, plan, bar.update)
    print(f"{_total(plan.files)} freed")
    _next(uri, "--verify")


def compact_store(uri: str, target_mb: int) -> None:
    """Make few large files of many small ones, and publish a version of them.

    Raises:
        UserError: nothing published there, or a size below 1 MB.
    """
    if target_mb < 1:
        raise UserError(f"--target-mb {target_mb}: give 1 or more")
    store = LatentStore(uri)
    newest = store.open_version().number
    with locked(store.uri):
        done = [compact(store, table, target_mb * 2**20) for table in TABLES]
        number = publish_compacted(store)
    columns = ("table", "files before", "files now", "size before", "size now")
    print_table(f"files of {masked(store.uri)}", columns, [_compaction_row(each) for each in done])
    if number is None:
        print(
            f"the tables hold other rows than version {newest}: `ldm encode` will publish them "
            "with these files"
        )
    elif number == newest:
        print(f"nothing new to publish: version {newest} has these files")
    else:
        print(f"version {number}: the rows of version {newest} in these files")
        print("the former files stay for the versions that have them, until --vacuum")
    _next(uri, "--vacuum", "--keep", "1", "--dry-run")


# Lines and rows


def _tell_vacuum(store: LatentStore, plan: VacuumPlan, older_than: float, words: str) -> None:
    rows: list[list[Cell]] = [
        ["versions", len(plan.versions), ""],
        ["files only they had, or none", len(plan.superseded), _total(plan.superseded)],
        ["abandoned files", len(plan.abandoned), _total(plan.abandoned)],
    ]
    print_table(f"what {words} of {masked(store.uri)}", ("", "number", "size"), rows)
    _list_some("versions", [str(number) for number in plan.versions])
    _list_some("files", [f"{file.table}/{file.path}" for file in plan.files])
    print(f"versions kept: {', '.join(map(str, plan.kept))}")
    if plan.young:
        print(
            f"{len(plan.young)} uncommitted files stay, younger than {older_than:g} hours: a "
            "running job may have written them (--older-than)"
        )


def _facts(version: StoreVersion) -> AutoencoderFacts | None:
    """What is at the manifest's URI of the autoencoder, if it is one."""
    try:
        return autoencoder_facts(version.manifest.autoencoder.uri)
    except (UserError, OSError):
        return None


def _check_lines(checks: Sequence[Check]) -> Iterator[str]:
    for check in checks:
        result = "FAILED" if check.failed else "good" if check.checked else "-"
        counts = f"{check.failed:,} of {check.checked:,}" if check.failed else f"{check.checked:,}"
        note = f"  ({masked(check.note)})" if check.note else ""
        yield f"{result:<7} {counts:>15}  {check.rule}{note}"
        for each in check.first:
            yield f"{'':<7} {'':>15}    {masked(each)}"
        if check.failed > len(check.first):
            yield f"{'':<7} {'':>15}    and {check.failed - len(check.first):,} more"


def _remedy(version: StoreVersion, failed: int, checks: int) -> str:
    uri = masked(version.store.uri)
    others = [str(number) for number in version.store.versions() if number != version.number]
    other = f"use another version if it holds ({', '.join(others)}), " if others else ""
    return (
        f"{failed} of {checks} checks failed for version {version.number} of {uri}. To mend it: "
        f"{other}put the named files back from a copy, or `ldm encode` into an empty --root"
    )


def _compaction_row(done: Compaction) -> list[Cell]:
    sizes = byte_size(done.bytes_before), byte_size(done.bytes_after)
    return [done.table, done.files_before, done.files_after, *sizes]


def _total(files: Sequence[DataFile]) -> str:
    return byte_size(sum(file.bytes for file in files))


def _list_some(title: str, names: Sequence[str]) -> None:
    if names:
        more = f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        print(f"{title}: {', '.join(names[:SHOWN])}{more}")


def _next(uri: str, *words: Any) -> None:
    print(f"next: {shlex.join(['ldm', 'store', masked(uri), *words])}", flush=True)
