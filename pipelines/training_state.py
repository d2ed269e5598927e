"""Where a training worker begins, and what it leaves for the next one: checkpoints under the root.

They are the project's own and Ray Train hears nothing of them: its controller writes a list of its
checkpoints without trying again, and with it a storage that is away for ten seconds ends the run.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import ray
import ray.train

from ldm_core.files import remove
from ldm_core.training.checkpoint_folder import MANIFEST, Checkpoint, listing, step_of
from ldm_core.training.checkpoint_patience import patiently
from ldm_core.training.checkpoint_ranks import Ranks
from ldm_core.training.checkpoint_retention import Retention, remove_checkpoint
from ldm_core.training.checkpoint_snapshots import snapshot
from ldm_core.training.checkpoint_state import Average, TrainingState
from ldm_core.training.checkpoints import Checkpoints, SaveFailed
from ldm_core.training.power_ema import PowerEma
from ldm_core.training.step import TrainingStep
from pipelines.ray_training import Job, due
from pipelines.teacher_places import snapshots_place
from pipelines.tracking import Run

T = TypeVar("T")
MOST_FAILED = 3  # saves in a row; each of them has tried for minutes


class Resuming:
    """A worker's side of its run's checkpoints. All workers make all calls.

    Args:
        job: of the worker.
        update: whose network, optimisers and counters are kept.
        averages: of the weights, by name.
        architecture: what the weights are of, as JSON; checkpoints of another are refused.
        layout: of the workers, for whoever reads the manifest.
        keep: that many checkpoints stay.
    """

    def __init__(
        self,
        job: Job,
        update: TrainingStep,
        averages: Mapping[str, Average],
        architecture: Mapping[str, Any],
        layout: str = "",
        keep: int = 2,
    ) -> None:
        self.job, self.update = job, update
        self.state = TrainingState(
            update.network, update.optimizers.all, averages, trained_only=True
        )
        self.checkpoints = Checkpoints(
            job.checkpoints,
            architecture,
            layout,
            Ranks.together(),
            Retention(last=keep),
            told=_tell,
            failed=_Forgiving(job.run, "failed_checkpoints"),
        )

    def restore(self, complete: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> int:
        """Go back to the newest sound checkpoint, if there is one; returns the steps done.

        Args:
            complete: asked on the first worker whether what a checkpoint of these facts did not
                hold when it was saved is there by now. One without it is removed, and the one
                before is taken.
        """
        found = self.checkpoints.newest()
        while found is not None and not self._agreed(partial(complete, found.state)):
            self._agreed(partial(self._remove, found))
            found = self.checkpoints.newest()
        if found is None:
            return self.job.begin(0, 0.0)
        self.state.load(found)
        self.update.load_state_dict(found.state["update"])
        if self.checkpoints.ranks.rank == 0:
            for entry in found.state.get("untold", []):
                self.job.run.tell(entry)
        return self.job.begin(found.step, found.state["seconds"])

    def save(self, done: int, more: Mapping[str, Any] = {}) -> None:
        """Keep the state after `done` steps, and `more` facts; it is written while training goes
        on.
        """
        first = self.checkpoints.ranks.rank == 0
        seconds = ray.get(self.job.board.seconds.remote()) if first else 0.0
        facts = {
            **self.state.facts(),
            "update": self.update.state_dict(),
            "seconds": seconds,
            "untold": self.job.run.untold(),  # what this worker's end would have forgotten
            **more,
        }
        self.checkpoints.save(done, self.state.tensors(), facts)

    def wait(self) -> None:
        """Until what was saved last is written."""
        self.checkpoints.wait()

    def _agreed(self, answer: Callable[[], T]) -> T:
        return self.checkpoints.ranks.first(answer)

    def _remove(self, checkpoint: Checkpoint) -> None:
        _tell(f"{checkpoint.uri} lacks what was to be written after it: going back to one before")
        patiently(lambda: remove_checkpoint(checkpoint.uri))


class _Forgiving:
    """A checkpoint less is no reason to stop; storage that is gone for good is one."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.count = run, name, 0

    def __call__(self, failure: SaveFailed) -> None:
        self.count += 1
        if failure.in_a_row >= MOST_FAILED:
            raise failure
        if ray.train.get_context().get_world_rank() == 0:
            _tell(f"{failure}; training goes on")
            self.run.metrics({self.name: self.count}, failure.step)


def _tell(line: str) -> None:
    print(line, flush=True)


class Snapshots:
    """Power-function averages as they were every `train.snapshot_every` steps, all of which stay:
    averages of any other width can be made of them afterwards
    (`ldm_core.training.checkpoint_snapshots`).

    They lie beside the product, in a folder of the run's own, and outlive its checkpoints.
    """

    def __init__(
        self, job: Job, averages: Mapping[str, Any], architecture: Mapping[str, Any]
    ) -> None:
        self.every = job.recipe.train.snapshot_steps
        self.powers = {n: each for n, each in averages.items() if isinstance(each, PowerEma)}
        self.checkpoints = Checkpoints(
            snapshots_place(job.product, job.checkpoints.rpartition("/")[2]),
            architecture,
            ranks=Ranks.together() if self.powers else Ranks(),
            retention=Retention(last=None),
            told=_tell,
            failed=self._failed,
        )
        self._forgiving = _Forgiving(job.run, "failed_snapshots")
        self._lost = -1

    def begin(self, first: int, last: int) -> None:
        """Training begins after `first` of `last` steps. Snapshots of another run that began anew
        under the same settings, by force, are none of its own; one of the first step itself may
        have been lost with the workers that had saved their checkpoint.
        """
        ranks = self.checkpoints.ranks
        if not self.powers:
            return
        if not first:
            ranks.first(lambda: patiently(lambda: remove(self.checkpoints.root)))
        elif not ranks.first(lambda: self._has(first)):
            self.keep(first, last)

    def keep(self, done: int, last: int) -> None:
        """Keep the averages after `done` of `last` steps, if it is time to and there are some."""
        if self.powers and due(done, self.every, last):
            self.checkpoints.save(done, *snapshot(self.powers))

    def wait(self, last: int) -> None:
        """Until what was saved last is written; that of the last step is tried once more."""
        self.checkpoints.wait()
        if self._lost == last:
            self.checkpoints.failed = lambda failure: _tell(str(failure))  # one less ends no run
            self.keep(last, last)
            self.checkpoints.wait()

    def _has(self, step: int) -> bool:
        found = patiently(lambda: listing(self.checkpoints.root))
        return any(step_of(folder) == step and MANIFEST in found[folder] for folder in found)

    def _failed(self, failure: SaveFailed) -> None:
        self._lost = failure.step
        self._forgiving(failure)
