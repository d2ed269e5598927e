"""What every stage has in common: up to date or not, one MLflow run, a record written last."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ldm_core.files import exists, filesystem, join, read_json, remove, write_json
from ldm_core.latents.lock import StoreLock, locked
from pipelines.credentials import masked
from pipelines.progress import Progress
from pipelines.ray_address import check_cluster
from pipelines.recipes.schema import Recipe
from pipelines.tracking import Run, track


@dataclass(frozen=True)
class Options:
    """How the user wants the stage run."""

    verbose: bool = False
    force: bool = False
    dry_run: bool = False
    retry_rejects: bool = False  # of encode: what was rejected is tried again


EARLIER_SECONDS = "earlier_seconds"  # in the summary of a stage that went on after a kill


class Record(BaseModel):
    """A finished stage, kept as `record.json` in its product: what, from what, how long.

    Attributes:
        seconds: of the command that finished it, and of the killed ones before it up to the
            checkpoint it went on from.
    """

    stage: str
    digest: str
    run_id: str
    tracking_uri: str
    product: str
    inputs: dict[str, str]
    seconds: float
    summary: dict[str, Any]


StageFunction = Callable[[Recipe, Options], Record | None]


@dataclass(frozen=True)
class Context:
    """What a stage's work gets: its MLflow run, a progress bar, the digest of what decides it."""

    recipe: Recipe
    stage: str
    run: Run
    digest: str
    product: str
    inputs: Mapping[str, str]
    options: Options

    def progress(self, total: int, unit: str, name: str = "") -> Progress:
        """A bar for this stage."""
        return Progress(name or self.product.rsplit("/", 1)[-1], total, unit)


def stage_digest(sections: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hex digits over everything that decides a stage's result."""
    text = json.dumps({"sections": sections, "inputs": dict(inputs)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_record(product: str) -> Record | None:
    """The record of the product, or None while it is not finished."""
    uri = join(product, "record.json")
    return Record.model_validate(read_json(uri)) if exists(uri) else None


def up_to_date(product: str, digest: str, options: Options) -> bool:
    """Whether the product already is what a stage of this digest makes."""
    return _stands(read_record(product), digest, options)


def _stands(record: Record | None, digest: str, options: Options) -> bool:
    return record is not None and record.digest == digest and not options.force


def forget_record(product: str) -> None:
    """What a stage does first when it begins to write its product.

    Until then the product is what its record says, whatever becomes of the stage; from then on it
    is half of something, or of two, until the new record is there.
    """
    remove(join(product, "record.json"))


def say_verdict(stage: str, verdict: str) -> None:
    """The last line of a dry run."""
    print(f"{stage}: {verdict}", flush=True)


def checkpoint_place(recipe: Recipe, product: str, digest: str) -> tuple[str, str]:
    """Folder and name of a stage's checkpoints, which outlive everything but its record."""
    return join(recipe.root, "checkpoints"), f"{product.rsplit('/', 1)[-1]}-{digest}"


def other_checkpoints(recipe: Recipe, product: str, digest: str) -> list[str]:
    """Names of the checkpoints of the same product under other digests, if it has none under this
    one: settings or inputs that decide the result have changed since.
    """
    folder, mine = checkpoint_place(recipe, product, digest)
    fs, path = filesystem(folder)
    if not fs.exists(path):
        return []
    names = sorted(each.rstrip("/").rpartition("/")[2] for each in fs.ls(path, detail=False))
    kind = re.compile(re.escape(mine.removesuffix(digest)) + "[0-9a-f]{16}")
    return [] if mine in names else [name for name in names if kind.fullmatch(name)]


def _tell_others(recipe: Recipe, stage: str, product: str, digest: str) -> None:
    """Say that nothing is gone on with, to a user who may have meant to."""
    if others := other_checkpoints(recipe, product, digest):
        folder, _ = checkpoint_place(recipe, product, digest)
        print(
            f"[{stage}] begins anew: what is in {folder} ({', '.join(others)}) was made with other "
            "settings or inputs; with those it would be gone on with, and nobody else removes it",
            flush=True,
        )


def _alone(recipe: Recipe, product: str) -> AbstractContextManager[StoreLock]:
    """Two commands that make the same product would take each other's checkpoints away.

    One that is started again elsewhere, as its machine was lost, waits until that is known.
    """
    return locked(join(recipe.root, ".running", product.rsplit("/", 1)[-1]), wait=True)


def run_stage(
    recipe: Recipe,
    stage: str,
    product: str,
    sections: Mapping[str, Any],
    inputs: Mapping[str, str],
    work: Callable[[Context], dict[str, Any]],
    options: Options,
) -> Record | None:
    """Run `work` unless the product already is what it would make; write the record last.

    `work` calls `forget_record` before it touches the product, so one that is half made, or by half
    another, is never taken for finished, and a run that is refused or fails before that leaves the
    former product finished. Checkpoints under the stage's digest are gone on with, but not with
    `force`.

    In a dry run it only says which of the two it would be, and returns None if it would work.

    Args:
        recipe: the resolved recipe.
        stage: the stage's name.
        product: URI of the folder the stage makes.
        sections: the settings that decide the result (not those that only say how fast).
        inputs: product name -> digest of each input.
        work: does it, and returns a summary for the record.
        options: verbose, force, dry run.

    Raises:
        UserError: raised by `work`; or there is work, and nothing answers at RAY_ADDRESS, or
            another command makes the same product.
    """
    digest = stage_digest(sections, inputs)
    record = read_record(product)
    fresh = _stands(record, digest, options)
    if options.dry_run:
        say_verdict(stage, "is up to date (--force makes it again)" if fresh else "would run")
        return record if fresh else None
    checkpoints = join(*checkpoint_place(recipe, product, digest))
    if fresh:
        remove(checkpoints)  # a kill between record and removal left them
        print(f"[{stage}] up to date: {product} (--force makes it again)", flush=True)
        return record
    check_cluster()  # now: a run that is opened for nothing stays as a failed one
    with _alone(recipe, product) as lock:
        record = read_record(product)
        if _stands(record, digest, options):  # another has made it while this one waited
            return record
        if options.force:
            remove(checkpoints)
        _tell_others(recipe, stage, product, digest)
        record = _made(recipe, stage, product, digest, inputs, work, options, record, lock)
        remove(checkpoints)
    return record


def _made(
    recipe: Recipe,
    stage: str,
    product: str,
    digest: str,
    inputs: Mapping[str, str],
    work: Callable[[Context], dict[str, Any]],
    options: Options,
    record: Record | None,
    lock: StoreLock,
) -> Record:
    """Do the work in a run, and write its record; `record` is that of a former product."""
    start = time.monotonic()
    with track(recipe, stage, digest, product) as run:
        if record is not None and record.digest == digest:
            forget_record(product)  # made again by force: a kill is gone on from without it
        run.tags({f"input.{name}": value for name, value in inputs.items()})
        summary = work(Context(recipe, stage, run, digest, product, inputs, options))
        earlier = summary.get(EARLIER_SECONDS, 0.0)
        seconds = earlier + time.monotonic() - start
        numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        run.metrics({**numbers, "stage_seconds": seconds})
        record = Record(
            stage=stage,
            digest=digest,
            run_id=run.id,
            tracking_uri=masked(run.uri),
            product=product,
            inputs=dict(inputs),
            seconds=seconds,
            summary=summary,
        )
        lock.check()
        # While the run is open: a kill before this line is gone on from in the same run.
        write_json(join(product, "record.json"), record.model_dump(mode="json"))
    before = f" ({earlier:.0f}s of it before it went on)" if earlier else ""
    print(f"[{stage}] done in {seconds:.0f}s{before}: {product}  (MLflow run {run.id})", flush=True)
    return record
