"""How fast each part of an encode was: counted where the work is done, added up by the driver."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pipelines.text_tables import Cell, print_table

T = TypeVar("T")

# What a worker does to a shard, in that order, and what the driver does with the result. What is
# told of reading is how long decoding waited for it: files are read ahead by threads of their own.
READ, DECODE, ENCODE, TEXT, WRITE, COMMIT = "read", "decode", "encode", "text", "write", "commit"
_ON_ACTORS = (ENCODE, TEXT, WRITE)


@dataclass
class Work:
    """Of one kind: pictures, clips or captions, their bytes, and the seconds it took."""

    items: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Throughput:
    """Work by kind. What workers did comes with their results and is added up."""

    def __init__(self) -> None:
        self.kinds: dict[str, Work] = {}
        self.shards = 0  # that there were for the workers

    @contextmanager
    def timed(self, kind: str, items: int, size: int = 0) -> Iterator[None]:
        """Count so many items, of so many bytes, and the seconds until they are done."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._count(kind, items, size, time.perf_counter() - start)

    def each(self, kind: str, items: Iterable[T]) -> Iterator[T]:
        """The items; the time until each of them comes is counted."""
        start = time.perf_counter()
        for item in items:
            self._count(kind, 1, 0, time.perf_counter() - start)
            yield item
            start = time.perf_counter()

    def add(self, told: str) -> None:
        """Add what another has told."""
        for kind, (items, size, seconds) in json.loads(told or "{}").items():
            self._count(kind, items, size, seconds)

    def tell(self) -> str:
        """For `add`, in another process."""
        return json.dumps({k: (w.items, w.bytes, w.seconds) for k, w in self.kinds.items()})

    def waiting(self, seconds: float, workers: int, decoding: bool) -> float:
        """The share of the workers' time in which they had nothing to do, their start included.

        Args:
            seconds: that all of it took by the clock.
            workers: that were there, who are no more than there were shards.
            decoding: whether they decode what they encode.
        """
        kinds = (*_ON_ACTORS, *((READ, DECODE) if decoding else ()))
        busy = sum(self.kinds[kind].seconds for kind in kinds if kind in self.kinds)
        return max(0.0, 1 - busy / max(seconds * workers, 1e-9))

    def metrics(self) -> dict[str, float]:
        """For MLflow: items and bytes a second of one worker that does nothing else."""
        found: dict[str, float] = {}
        for kind, work in self.kinds.items():
            seconds = max(work.seconds, 1e-9)
            found[f"throughput/{kind}_seconds"] = work.seconds
            found[f"throughput/{kind}_per_second"] = work.items / seconds
            if work.bytes:
                found[f"throughput/{kind}_bytes_per_second"] = work.bytes / seconds
        return found

    def print(self, waiting: float) -> None:
        """A small table, and how much of their time the workers waited."""
        total = max(sum(work.seconds for work in self.kinds.values()), 1e-9)
        rows: list[list[Cell]] = []
        for kind in sorted(self.kinds, key=(READ, DECODE, ENCODE, TEXT, WRITE, COMMIT).index):
            work, seconds = self.kinds[kind], max(self.kinds[kind].seconds, 1e-9)
            name = "wait to read" if kind == READ else kind
            size = f"{work.bytes / seconds / 1e6:,.1f}" if work.bytes else ""
            share = f"{100 * work.seconds / total:.0f} %"
            rows.append([name, work.items, f"{work.items / seconds:,.1f}", size, share])
        columns = ("stage", "items", "per second", "MB per second", "of the work")
        print_table("throughput of one worker", columns, rows)
        print(f"[encode] workers waited {100 * waiting:.0f} % of their time", flush=True)

    def _count(self, kind: str, items: int, size: int, seconds: float) -> None:
        work = self.kinds.setdefault(kind, Work())
        work.items += items
        work.bytes += size
        work.seconds += seconds
