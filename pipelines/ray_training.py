"""What the training stages share: Ray Train's trainer, checkpoints, and the driver's progress bar.

A worker function gets a `Job`; whatever it needs to go on after a kill is in the last checkpoint.
"""

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.fs
import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ldm_core.errors import UserError
from ldm_core.files import absolute, filesystem, is_remote
from ldm_core.training.ema import Ema
from ldm_core.training.step import TrainingStep
from pipelines.progress import Progress
from pipelines.progress_board import ProgressBoard
from pipelines.ray_runtime import check_room, start
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers
from pipelines.stage import EARLIER_SECONDS, Context, checkpoint_place
from pipelines.tracking import Run

STATE = "state.pt"


@dataclass(frozen=True)
class Job:
    """What a worker function is given; `inputs` are the stage's, pinned when it began."""

    recipe: Recipe
    run: Run
    product: str
    inputs: dict[str, str]
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
) -> dict[str, Any]:
    """Run `worker` on every worker to the end and return what the first one returned.

    And `earlier_seconds`, which earlier commands took for what this one went on from.

    A killed worker, or the same command after a killed driver, goes on from the last checkpoint:
    they lie under the recipe's root until the stage is recorded (`run_stage` removes them).

    Raises:
        UserError: raised by a worker, or the cause of a failure that the retries did not mend.
    """
    start(context.options.verbose)
    remedy = f"lower {context.stage}.workers.count, .cpus or .gpus"
    check_room(context.stage, workers.count * workers.cpus, workers.count * workers.gpus, remedy)
    folder, name = checkpoint_place(context.recipe, context.product, context.digest)
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    job = Job(
        context.recipe.located(),
        context.run,
        absolute(context.product),
        dict(context.inputs),
        board,
        workers,
    )
    trainer = TorchTrainer(
        cast(Any, worker),  # Ray's types know no worker that returns something
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
        scaling_config=_scaling(workers),
        run_config=RunConfig(
            name=name,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            **_storage(folder),
        ),
    )
    with context.progress(steps, "steps") as bar, _watching(board, bar):
        try:
            result = trainer.fit()
        except Exception as error:
            raise _cause(error) from error
    summary = dict(cast(Any, result).return_value or {})
    return {**summary, EARLIER_SECONDS: ray.get(board.earlier.remote())}


def _scaling(workers: Workers) -> ScalingConfig:
    resources = {"CPU": workers.cpus}
    if workers.gpus:
        resources["GPU"] = workers.gpus
    return ScalingConfig(
        num_workers=workers.count, use_gpu=bool(workers.gpus), resources_per_worker=resources
    )


def _storage(folder: str) -> dict[str, Any]:
    """Ray Train's storage arguments; s3 through fsspec, which honours AWS_ENDPOINT_URL."""
    if not is_remote(folder):
        return {"storage_path": absolute(folder)}
    fs, path = filesystem(folder)
    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return {"storage_path": path, "storage_filesystem": wrapped}


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


# On the workers


def restore(job: Job, update: TrainingStep, ema: Ema | None = None) -> int:
    """Go back to the last checkpoint if there is one; returns how many steps are done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return job.begin(0, 0.0)
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder, STATE), weights_only=True, map_location="cpu")
    update.network.load_state_dict(state["network"])
    update.optimizers.load_state_dict(state["optimizers"])
    if ema:
        ema.load_state_dict(state["ema"], state["ema_updates"])
    return job.begin(state["step"], state["seconds"])


def save(job: Job, update: TrainingStep, ema: Ema | None, done: int) -> None:
    """Report from every worker that `done` steps are finished, and a checkpoint from the first."""
    if ray.train.get_context().get_world_rank():
        ray.train.report({"step": done})
        return
    state = {
        "network": update.network.state_dict(),
        "optimizers": update.optimizers.state_dict(),
        "step": done,
        "seconds": ray.get(job.board.seconds.remote()),
    }
    if ema:
        state |= {"ema": ema.state_dict(), "ema_updates": ema.updates}
    with tempfile.TemporaryDirectory(prefix="ldm-checkpoint-") as folder:
        torch.save(state, Path(folder, STATE))
        ray.train.report({"step": done}, checkpoint=Checkpoint.from_directory(folder))


def due(done: int, every: int, steps: int) -> bool:
    """Whether what is done every so often is to be done now; at the end it always is."""
    return done % every == 0 or done == steps
