"""What the machines do while they train: processors, memory, disk, network, GPUs.

MLflow's sampler, one for each node, tells the training's run under `system/node-K/…`; GPUs are told
of where `nvidia-ml-py` is installed. It is a thread of ours that asks it: MLflow's own asks the
server for the run before each sample, and ends for good when no answer comes.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import ray.train

from pipelines.credentials import masked
from pipelines.recipes.sections import TrainSection
from pipelines.tracking import Run, load_sampler

EVERY_S = 60.0
LAST_S = 5.0  # that the end of a training waits for the last sample


def watched_node(section: TrainSection) -> int | None:
    """This worker's node, if it is the worker that samples it: the first one there."""
    context = ray.train.get_context()
    first = context.get_local_rank() == 0
    return context.get_node_rank() if section.system_metrics and first else None


@contextmanager
def sampled(run: Run, node: int | None, every: float = EVERY_S) -> Iterator[None]:
    """Meanwhile, sample this machine every so many seconds, and at the end; not if `node` is None.

    A server that is away costs samples, and no more than `LAST_S` seconds of training.
    """
    if node is None:
        yield
        return
    load_sampler()  # not in the thread: two that import MLflow at once get half of it
    ended = threading.Event()
    thread = threading.Thread(
        target=_sample, args=(run, node, every, ended), daemon=True, name="system-metrics"
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(LAST_S)


def _sample(run: Run, node: int, every: float, ended: threading.Event) -> None:
    sampler, last = _Sampler(run, f"node-{node}"), False
    sampler.attempt(sampler.begin)
    while not last:
        last = ended.wait(every)
        sampler.attempt(sampler.sample)


class _Sampler:
    """MLflow's sampler, of which nothing that goes wrong is a reason to stop training."""

    def __init__(self, run: Run, node: str) -> None:
        self.run, self.node, self.failed = run, node, False
        self._inner: Any = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Tells of the first failure: of the server, or of a sensor."""
        try:
            action()
        except Exception as error:
            if not self.failed:
                print(masked(f"no system metrics of {self.node} for now: {error}"), flush=True)
            self.failed = True

    def begin(self) -> None:
        psutil.cpu_percent()  # which is of the time since this thread asked last
        self._inner = load_sampler()(self.run, self.node)
        self.run.tags({f"system.{self.node}": socket.gethostname()})

    def sample(self) -> None:
        if self._inner is None:
            self.begin()
        self._inner.collect_metrics()
        self._inner.publish_metrics(self._inner.aggregate_metrics())
