"""Readers of one store as a large job has them: many ranks, dealt out over some processes."""

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import psutil
from faulty_proxy import FaultyProxy
from proxy_faults import Request

from ldm_core.patient_s3 import PatientS3
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.stream import StreamReader

START_S = 300.0  # that the processes have to import what they need


@dataclass(frozen=True)
class Rank:
    """What a rank did.

    Attributes:
        ids: keys of its samples, in order.
        first_s: from all ranks' common start to its first batch.
    """

    number: int
    ids: tuple[int, ...]
    first_s: float


@dataclass(frozen=True)
class Process:
    """A process of some ranks, and by how many bytes its resident memory grew at most.

    What every process has once, such as Arrow and the S3 client, is loaded before.
    """

    ranks: tuple[Rank, ...]
    grown: int


def read_in_processes(
    index: StoreIndex, ranks: int, processes: int, steps: int, options: dict[str, Any]
) -> list[Process]:
    """Every rank reads the first steps of an epoch, all of them beginning together.

    Args:
        index: of the store.
        ranks: readers, each with a lane of its own.
        processes: that share them.
        steps: so many, or the epoch if that is shorter; samples of another epoch are left out.
        options: of the readers besides, picklable.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes)
    dealt = [range(k, ranks, processes) for k in range(processes)]
    with context.Manager() as manager:
        results = manager.list()
        running = [
            context.Process(target=_read, args=(index, mine, ranks, steps, options, start, results))
            for mine in dealt
        ]
        for process in running:
            process.start()
        for process in running:
            process.join()
        assert [process.exitcode for process in running] == [0] * processes
        return list(results)


def _read(
    index: StoreIndex,
    mine: Sequence[int],
    ranks: int,
    steps: int,
    options: dict[str, Any],
    start: Barrier,
    results: Any,
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with _reader(index, 1, options | {"window_bytes": 1}) as reader:
        reader.first(1)
    start.wait(START_S)
    begin, before = time.perf_counter(), psutil.Process().memory_info().rss
    grown = 0

    def read(number: int) -> Rank:
        nonlocal grown
        ids: list[int] = []
        first = 0.0
        with _reader(index, ranks, options) as reader:
            for step in range(min(steps, reader.order.steps(1).start)):
                for batch in reader.batches(step, number, ranks, epoch=0):
                    first = first or time.perf_counter() - begin
                    ids += batch.ids.tolist()
                grown = max(grown, psutil.Process().memory_info().rss - before)
        return Rank(number, tuple(ids), first)

    with ThreadPoolExecutor(len(mine)) as pool:
        results.append(Process(tuple(pool.map(read, mine)), grown))


def _reader(index: StoreIndex, lanes: int, options: dict[str, Any]) -> StreamReader:
    settings = {"seed": 0, "tokens": one_token, "threads": 1}
    return StreamReader([index], lanes=lanes, **(settings | options))


def one_token(bucket: str) -> int:
    """Of a sample of any bucket, so that a budget is a number of samples."""
    return 1


@contextmanager
def requests_counted() -> Iterator[Counter[str]]:
    """How often each object of the S3 server is read meanwhile, by whatever process begins now."""
    counts: Counter[str] = Counter()

    def count(request: Request) -> bool:
        counts[request.path] += request.method == "GET"
        return False

    server = os.environ["AWS_ENDPOINT_URL"]
    with FaultyProxy(server) as proxy:
        proxy.rule(count, lambda forward: None)
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        PatientS3.clear_instance_cache()
        try:
            yield counts
        finally:
            os.environ["AWS_ENDPOINT_URL"] = server
            PatientS3.clear_instance_cache()
