"""A run's checkpoints: every worker writes its share while training goes on.

```
checkpoints = Checkpoints(root, architecture, "ddp", Ranks.together())
found = checkpoints.newest()
...
checkpoints.save(step, tensors, state)     # copies, and returns
...
checkpoints.wait()                         # at the end
```
"""

import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from torch import Tensor

from ldm_core.files import join, write_bytes
from ldm_core.training.checkpoint_folder import (
    INDEX,
    MANIFEST,
    STATE,
    Checkpoint,
    Damaged,
    Entry,
    Manifest,
    architecture_digest,
    folder_name,
    json_bytes,
)
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_patience import patiently
from ldm_core.training.checkpoint_ranks import Ranks
from ldm_core.training.checkpoint_retention import Retention, remove_checkpoint, sweep
from ldm_core.training.checkpoint_shards import Piece, Staging, merged_index, parts


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were.

    Attributes:
        step: whose it was to be.
        in_a_row: how many saves in a row have failed, with this one.
    """

    def __init__(self, step: int, cause: Exception | str) -> None:
        super().__init__(f"the checkpoint of step {step} could not be written: {cause}")
        self.step, self.in_a_row, self._words = step, 0, str(cause)

    def __reduce__(self) -> tuple[Any, ...]:
        """In words: other processes may be unable to rebuild the cause."""
        return type(self), (self.step, self._words), self.__dict__


@dataclass(frozen=True)
class Saved:
    """Of a committed checkpoint: bytes of all workers, and seconds since its copy was made."""

    step: int
    size: int
    seconds: float


class Checkpoints:
    """Saves and finds the checkpoints of one run.

    Attributes:
        last: what was committed last.
        failures: how many saves have failed.
    """

    def __init__(
        self,
        root: str,
        architecture: Mapping[str, Any],
        layout: str = "",
        ranks: Ranks = Ranks(),
        retention: Retention = Retention(),
        told: Callable[[str], None] = warnings.warn,
        failed: Callable[[SaveFailed], None] | None = None,
    ) -> None:
        """Args:
        root: a folder of their own, local or `s3://`.
        architecture: what the weights are of, as JSON: class and configuration.
        layout: of this run, in words, for whoever reads the manifest.
        ranks: the workers, each of which makes every call; not shared with other checkpoints.
        retention: which stay.
        told: is given a line for each damaged checkpoint, and when old ones cannot be removed.
        failed: is given a save that failed, on every worker, at the next call after it; without
            it, that call raises.
        """
        self.root, self.architecture, self.layout = root, dict(architecture), layout
        self.ranks, self.retention, self.told, self.failed = ranks, retention, told, failed
        self.last: Saved | None = None
        self.failures = self._in_a_row = 0
        self._committed = ""
        self._staging = Staging(ranks)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: Future[Saved] | None = None

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint of this architecture, as `checkpoint_newest.newest`."""
        return newest(self.root, self.architecture, self.told, self.ranks)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy what is to be saved, and write it in the background.

        Waits for the save before it, if that is still under way.

        Args:
            step: optimiser steps done.
            tensors: by name, the same names on every worker; plain ones are the same on all.
            state: the rest, as JSON; the first worker's counts.

        Raises:
            SaveFailed: the one before, unless `failed` takes it.
        """
        self.wait()
        offered = self.ranks.exchange((folder_name(step), self._staging.known(tensors)))
        pieces = self._staging.copy(tensors, plan_anew=not all(known for _, known in offered))
        self._flight = self._pool.submit(
            self._write, offered[0][0], step, pieces, json_bytes(dict(state))
        )

    def wait(self) -> None:
        """Return when nothing is under way.

        Raises:
            SaveFailed: the last save, unless `failed` takes it.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        try:
            self.last, self._in_a_row = flight.result(), 0
        except SaveFailed as error:
            self.failures += 1
            self._in_a_row += 1
            error.in_a_row = self._in_a_row
            if not self.failed:
                raise
            self.failed(error)

    def _write(self, folder: str, step: int, pieces: list[Piece], state: bytes) -> Saved:
        """In the background: this worker's parts; on the first, when all have theirs, the rest."""
        began, uri = time.monotonic(), join(self.root, folder)
        try:
            written = self.ranks.each(lambda: _write_parts(uri, pieces, self.ranks.rank))
            size = self.ranks.first(lambda: self._finish(uri, step, written, state))
            self.ranks.first(lambda: self._sweep(folder))
        except AssertionError:
            raise
        except Exception as error:  # a storage's client has errors of its own classes
            failure = SaveFailed(step, error)
            # a worker that is lost after the manifest was written takes nothing away
            if self.ranks.rank == 0 and self._committed != uri:
                self._clear(uri, failure)
            raise failure from error
        return Saved(step, size, time.monotonic() - began)

    def _finish(self, uri: str, step: int, written: list["_Written"], state: bytes) -> int:
        """Write index, state and manifest; returns the checkpoint's bytes."""
        files = {name: entry for worker in written for name, entry in worker.files.items()}
        index = json_bytes(merged_index([e for worker in written for e in worker.entries]))
        for name, data in ((INDEX, index), (STATE, state)):
            files[name] = _write_file(join(uri, name), data)
        manifest = Manifest(
            step=step,
            architecture=self.architecture,
            digest=architecture_digest(self.architecture),
            layout=self.layout,
            workers=self.ranks.world,
            files=files,
        )
        _write_file(join(uri, MANIFEST), manifest.to_bytes())
        self._committed = uri
        return sum(entry.size for entry in files.values())

    def _clear(self, uri: str, failure: SaveFailed) -> None:
        """What a failed save leaves would keep a full disk full."""
        try:
            remove_checkpoint(uri)
        except Exception as error:  # whatever it is, the save's own failure is to be told
            failure.add_note(f"what there is of it could not be removed: {error}")

    def _sweep(self, folder: str) -> None:
        """Remove what need not stay.

        Raises:
            Damaged: what was just written is not there as it was.
        """
        try:
            patiently(lambda: sweep(self.root, self.retention, folder))
        except (AssertionError, Damaged):
            raise
        except Exception as error:
            self.told(f"old checkpoints at {self.root} could not be removed: {error}")


@dataclass(frozen=True)
class _Written:
    files: dict[str, Entry]
    entries: list[dict[str, Any]]


def _write_parts(uri: str, pieces: list[Piece], rank: int) -> _Written:
    files, entries = {}, []
    for part in parts(pieces, rank):
        files[part.name] = _write_file(join(uri, part.name), part.data)
        entries += part.entries
    return _Written(files, entries)


def _write_file(uri: str, data: bytes) -> Entry:
    """Write it, perhaps again where an answer was lost: the same bytes under the same name."""
    patiently(lambda: write_bytes(uri, data))
    return Entry(size=len(data), sha256=sha256(data).hexdigest())
