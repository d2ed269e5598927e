"""What the training stages share: Ray Train's trainer, and the driver's progress bar.

A worker function gets a `Job`; whatever it needs to go on after a kill is in the last checkpoint,
which `training_state.py` writes and finds.
"""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import ray
import ray.exceptions
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ldm_core.files import absolute, join
from pipelines.credentials import masked
from pipelines.progress import Progress
from pipelines.progress_board import ProgressBoard
from pipelines.ray_runtime import check_room, start
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers
from pipelines.run_beside import told_beside
from pipelines.stage import EARLIER_SECONDS, Context, checkpoint_place
from pipelines.tracking import Run
from pipelines.training_failures import CAUSE_LENGTH as CAUSE_LENGTH
from pipelines.training_failures import Causes, Summary, supervised

RESIZE_S = 1800.0  # workers join this often at most: with each, all begin at the last checkpoint
FLUSH_S, FLUSH_FAILED_S = 60.0, 5.0  # that a worker waits at its end until the run is told
WARNED_S = 2.0  # that a worker waits for a warning of its own to be received
UNTOLD = "untold"  # in a worker's summary: what the driver is to tell the run

WorkerFunction = Callable[[dict[str, "Job"]], Summary]


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

    def warn(self, line: str, kind: str = "") -> None:
        """Tell the user: what workers print is in their logs alone.

        Args:
            line: whatever it is.
            kind: lines of one kind are shown once a minute, however many workers have them.
        """
        print(line, flush=True)
        told = self.board.warn.remote(kind or line, line)
        ray.wait([told], timeout=WARNED_S)  # a worker that ends at once would take it along


def fit(
    context: Context,
    worker: WorkerFunction,
    workers: Workers,
    steps: int,
    max_failures: int,
    least: int | None = None,
    gpus_beside: float = 0.0,
) -> Summary:
    """Run `worker` on every worker to the end and return what the first one returned.

    And `earlier_seconds`, which earlier commands took for what this one went on from.

    A killed worker, or the same command after a killed driver, goes on from the last checkpoint:
    they lie under the recipe's root until the stage is recorded (`run_stage` removes them). With
    `least`, so many workers are enough to go on, and others join as they come. `gpus_beside` are
    those that others need meanwhile.

    A worker's UserError ends it at once: what the user is to mend fails again every time.

    Raises:
        UserError: raised by a worker, or more workers are asked for than this machine has room for.
    """
    start(context.options.verbose)
    remedy = f"lower {context.stage}.workers.count, .cpus or .gpus"
    if gpus_beside:
        remedy += f", or {context.stage}.validation_gpus, beside them"
    needed = least or workers.count
    gpus = needed * workers.gpus + gpus_beside
    check_room(context.stage, needed * workers.cpus, gpus, remedy)
    folder, name = checkpoint_place(context.recipe, context.product, context.digest)
    board = _board_beside_the_driver()
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
        summary = supervised(train, job.run, max_failures)
    for entry in summary.pop(UNTOLD, []):  # its server was away at the very end
        context.run.tell(entry)
    return {**summary, EARLIER_SECONDS: ray.get(board.earlier.remote())}


def _board_beside_the_driver() -> Any:
    """On the driver's machine, so that it is lost with no other."""
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    actor: Any = ProgressBoard
    return actor.options(scheduling_strategy=here).remote()


def _train(worker: WorkerFunction, job: Job, max_failures: int, least: int | None) -> Summary:
    """Ray Train, from the last checkpoint on; what it keeps for itself does not outlive it."""
    with tempfile.TemporaryDirectory(prefix="ldm-train-") as scratch:
        trainer = TorchTrainer(
            cast(Any, partial(_work, worker)),  # Ray's types know none that returns something
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if job.workers.gpus else "gloo"),
            scaling_config=_scaling(job.workers, least),
            run_config=RunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=max_failures),
                callbacks=cast(Any, [Causes(job.run)]),
            ),
        )
        return dict(cast(Any, trainer.fit()).return_value or {})


def _work(worker: WorkerFunction, config: dict[str, Job]) -> Summary:
    """In a worker: its function, which waits for nobody who is told of it."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # the run beside tries on itself
    job = config["job"]
    warned = partial(job.warn, kind="tracking")
    with told_beside(job.run, warned) as run, _warnings_told(job):
        try:
            summary = worker({"job": replace(job, run=run)})
        except BaseException:
            run.outbox.flush(FLUSH_FAILED_S)
            raise
        run.outbox.flush(FLUSH_S)
        return {**summary, UNTOLD: run.untold()}


@contextmanager
def _warnings_told(job: Job) -> Iterator[None]:
    """What ldm_core warns of, such as a bucket that is waited for, reaches the user."""
    handler = _ToTheUser(job)
    logger = logging.getLogger("ldm_core")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _ToTheUser(logging.Handler):
    def __init__(self, job: Job) -> None:
        super().__init__(logging.WARNING)
        self.job = job

    def emit(self, record: logging.LogRecord) -> None:
        self.job.warn(record.getMessage(), kind=str(record.msg))


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


@contextmanager
def _watching(board: Any, bar: Progress) -> Iterator[None]:
    stop = threading.Event()
    heard = 0

    def show() -> None:
        nonlocal heard
        for line in ray.get(board.warnings.remote(heard)):
            bar.say(masked(line))
            heard += 1
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
        with suppress(ray.exceptions.RayError):
            show()  # what came since: a short training is over within the second


def being_preempted() -> bool:
    """Whether the machine of some worker is about to be taken away; all workers ask together."""
    return ray.train.get_preemption_info() is not None


def due(done: int, every: int, steps: int) -> bool:
    """Whether what is done every so often is to be done now; at the end it always is."""
    return done % every == 0 or done == steps
