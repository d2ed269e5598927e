"""Ray, started quietly: the cluster at RAY_ADDRESS if there is one, else this machine."""

import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator

# Read by Ray when it is imported.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
# In a submitted job Ray otherwise refuses variables that the job was given too, equal or not.
os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")

import ray

from ldm_core.errors import UserError
from pipelines.ray_address import check_cluster

# Ray Train on one machine: nobody takes it away with notice, and without a dashboard nobody reads
# its metrics. The end of a training is seen sooner.
TRAIN_ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
FORWARDED = ("AWS_", "MLFLOW_")


def worker_environment() -> dict[str, str]:
    """Variables every worker gets: the object store's, MLflow's, and how it uses the machine."""
    forwarded = {key: value for key, value in os.environ.items() if key.startswith(FORWARDED)}
    return {
        **forwarded,
        # what is not the stage's own, which sets its threads: else as many as there are cores
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc otherwise hands every large tensor's memory back to the system and faults it in
        # again a moment later, which costs a small model on a CPU a good part of its step
        "MALLOC_TRIM_THRESHOLD_": "1000000000",
        "MALLOC_MMAP_THRESHOLD_": "33554432",
        "MALLOC_TOP_PAD_": "67108864",
        # Arrow's S3 writer otherwise sends checksum trailers most S3-compatible stores refuse
        "AWS_REQUEST_CHECKSUM_CALCULATION": os.environ.get(
            "AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"
        ),
    }


def start(verbose: bool = False, cpus: int | None = None) -> None:
    """Connect to RAY_ADDRESS, or start Ray on this machine; does nothing if already connected.

    Args:
        verbose: whether Ray may talk.
        cpus: that a Ray started here counts; None takes the machine's.

    Raises:
        UserError: nothing answers at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    check_cluster()
    level = logging.INFO if verbose else logging.ERROR
    local = not os.environ.get("RAY_ADDRESS")
    if local:
        for name, value in TRAIN_ALONE.items():
            os.environ.setdefault(name, value)
    with _interrupted_afterwards():
        ray.init(
            "local" if local else None,  # None would join a Ray that happens to run here
            num_cpus=cpus,
            include_dashboard=False if local else None,
            log_to_driver=verbose,
            logging_level=level,
            runtime_env={"env_vars": worker_environment()},
        )
    # A UserError in a worker is the user's to read; Ray Data would hide it in an error of its own.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    quiet(verbose)


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """A Ctrl-C takes effect at the end: Ray left half started crashes with a signal of its own.

    A second one does not wait.
    """
    before = signal.getsignal(signal.SIGINT)
    asked = threading.Event()

    def wait(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked.is_set():
        raise KeyboardInterrupt


def check_room(section: str, cpus: float, gpus: float, remedy: str) -> None:
    """Refuse what this machine does not have, as Ray waits for it without end.

    A cluster may still grow, so there it only says what is being waited for.

    Args:
        section: of the recipe, whose workers ask for it.
        cpus: that must be free at once.
        gpus: the same.
        remedy: what to change on this machine.

    Raises:
        UserError: this machine has fewer.
    """
    gc.collect()  # a pipeline that failed in this process holds CPUs while its error is in a cycle
    have = ray.cluster_resources()
    need = {"CPU": cpus, "GPU": gpus}
    short = {name: n for name, n in need.items() if n > have.get(name, 0)}
    if not short:
        return
    asked = ", ".join(f"{n:g} {name} of {have.get(name, 0):g}" for name, n in short.items())
    if os.environ.get("RAY_ADDRESS"):
        print(f"[{section}] waits for the cluster to grow: it needs {asked}", flush=True)
        return
    raise UserError(
        f"{section} needs {asked} on this machine: {remedy}, or set RAY_ADDRESS to a larger cluster"
    )


def quiet(verbose: bool) -> None:
    """Keep Ray's own libraries from talking on the driver unless the user wants it."""
    if verbose:
        return
    for name in ("ray", "ray.train", "ray.serve", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it tells what it also raises
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.print_on_execution_start = False


@contextlib.contextmanager
def ray_session(verbose: bool = False) -> Iterator[None]:
    """Ray for the length of a command; only what this process started is shut down."""
    mine = not ray.is_initialized()
    start(verbose)
    try:
        yield
    finally:
        if mine:
            ray.shutdown()
