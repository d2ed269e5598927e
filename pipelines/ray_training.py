"""What the training stages share: Ray Train's trainer, and the driver's progress bar.

A worker function gets a `Job`; whatever it needs to go on after a kill is in the last checkpoint,
which `training_state.py` writes and finds.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

import ray
import ray.train
import torch
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchConfig, TorchTrainer

from ldm_core.errors import UserError
from ldm_core.files import absolute, join
from pipelines.progress import Progress
from pipelines.progress_board import ProgressBoard
from pipelines.ray_runtime import check_room, start
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers
from pipelines.stage import EARLIER_SECONDS, Context, checkpoint_place
from pipelines.tracking import Run

CAUSE_LENGTH = 500  # of a tag's value
RESIZE_S = 1800.0  # workers join this often at most: with each, all begin at the last checkpoint


@dataclass(frozen=True)
class Job:
    """What a worker function is given.

    Attributes:
        inputs: the stage's, pinned when it began.
        checkpoints: the folder of the run's checkpoints.
        board: the driver's `ProgressBoard`.
    """

    recipe: Recipe
    run: Run
    product: str
    inputs: dict[str, str]
    checkpoints: str
    board: Any
    workers: Workers

    def place(self) -> tuple[int, int, torch.device]:
        """Of this worker: its rank, the number of workers, and its device.

        A CPU worker also takes no more threads than its share.
        """
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        if self.workers.gpus:
            return rank, world, torch.device(ray.train.torch.get_device())
        torch.set_num_threads(self.workers.threads)
        return rank, world, torch.device("cpu")

    def begin(self, first: int, seconds: float) -> int:
        """The first worker tells the driver at which step it begins; returns that."""
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(self.board.begin.remote(first, seconds))
        return first

    def log(self, done: int, figures: Mapping[str, float], note: str) -> None:
        """What the run and the driver's bar are told when `done` steps are finished."""
        self.run.metrics(figures, done)
        self.board.post.remote(done, note)


def fit(
    context: Context,
    worker: Callable[[dict[str, Job]], dict[str, Any]],
    workers: Workers,
    steps: int,
    max_failures: int,
    least: int | None = None,
    gpus_beside: float = 0.0,
) -> dict[str, Any]:
    """Run `worker` on every worker to the end and return what the first one returned.

    And `earlier_seconds`, which earlier commands took for what this one went on from.

    A killed worker, or the same command after a killed driver, goes on from the last checkpoint:
    they lie under the recipe's root until the stage is recorded (`run_stage` removes them). With
    `least`, so many workers are enough to go on, and others join as they come. `gpus_beside` are
    those that others need meanwhile.

    Raises:
        UserError: raised by a worker, or the cause of a failure that the retries did not mend.
    """
    start(context.options.verbose)
    remedy = f"lower {context.stage}.workers.count, .cpus or .gpus"
    needed = least or workers.count
    gpus = needed * workers.gpus + gpus_beside
    check_room(context.stage, needed * workers.cpus, gpus, remedy)
    folder, name = checkpoint_place(context.recipe, context.product, context.digest)
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    job = Job(
        context.recipe.located(),
        context.run,
        absolute(context.product),
        dict(context.inputs),
        absolute(join(folder, name)),
        board,
        workers,
    )
    with context.progress(steps, "steps") as bar, _watching(board, bar):
        train = partial(_train, worker, job, max_failures, least)
        summary = _supervised(train, job.run, max_failures)
    return {**summary, EARLIER_SECONDS: ray.get(board.earlier.remote())}


def _train(
    worker: Callable[[dict[str, Job]], dict[str, Any]],
    job: Job,
    max_failures: int,
    least: int | None,
) -> dict[str, Any]:
    """Ray Train, from the last checkpoint on; what it keeps for itself does not outlive it."""
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as scratch:
        trainer = TorchTrainer(
            cast(Any, worker),  # Ray's types know no worker that returns something
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if job.workers.gpus else "gloo"),
            scaling_config=_scaling(job.workers, least),
            run_config=RunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=max_failures),
                callbacks=cast(Any, [_Causes(job.run)]),
            ),
        )
        return dict(cast(Any, trainer.fit()).return_value or {})


def _supervised(train: Callable[[], dict[str, Any]], run: Run, retries: int) -> dict[str, Any]:
    """Ray Train again when its controller has failed, which it does not retry for itself."""
    for attempt in range(retries + 1):
        try:
            return train()
        except Exception as error:
            cause = _cause(error)
            if not isinstance(cause, ControllerError) or attempt == retries:
                raise cause from (error if cause is not error else None)
            print(f"Ray Train's controller failed, going on from the last checkpoint: {error}")
            run.tags({f"controller_failure.{attempt + 1}": str(error)[-CAUSE_LENGTH:]})
    raise AssertionError("unreachable")


def _scaling(workers: Workers, least: int | None) -> ScalingConfig:
    resources = {"CPU": workers.cpus}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    return cast(Any, ScalingConfig)(  # mypy sees the class of Ray Train's first version
        num_workers=cast(Any, workers.count if least is None else (least, workers.count)),
        use_gpu=bool(workers.gpus),
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=RESIZE_S,
    )


class _Causes(UserCallback):
    """Tells the run why workers had to begin again, each reason once in a row."""

    def __init__(self, run: Run) -> None:
        self.run, self.count, self.last = run, 0, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, again and again while it waits."""
        first = next(iter(worker_exceptions.values()), None)
        told = f"worker {', '.join(map(str, worker_exceptions))}: {first}"[-CAUSE_LENGTH:]
        if told == self.last:
            return
        self.last = told
        self.count += 1
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        try:
            self.run.tags({f"failure.{now}.{self.count}": told})
        except Exception as error:  # of the tracking server: no reason to lose the controller
            print(f"could not tell the run of a failure, {told}: {error}", flush=True)


@contextmanager
def _watching(board: Any, bar: Progress) -> Iterator[None]:
    stop = threading.Event()

    def show() -> None:
        first, done, note = ray.get(board.read.remote())
        if first:
            bar.go_on_from(first)
        if done:
            bar.update(done, note)

    def watch() -> None:
        while not stop.wait(1.0):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)
    show()  # what came since: a short training is over within the second


def _cause(error: Exception) -> Exception:
    """The worker's own UserError if there is one, else the error as it came."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        seen: Any = failure
        while seen is not None:
            if isinstance(seen, UserError):
                return seen
            seen = getattr(seen, "cause", None) or seen.__cause__
    return error


def being_preempted() -> bool:
    """Whether the machine of some worker is about to be taken away; all workers ask together."""
    return ray.train.get_preemption_info() is not None


def due(done: int, every: int, steps: int) -> bool:
    """Whether what is done every so often is to be done now; at the end it always is."""
    return done % every == 0 or done == steps
