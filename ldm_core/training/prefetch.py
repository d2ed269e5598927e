"""Read the next steps while the present one is computed."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Waited:
    """Seconds a training loop has waited for its data.

    Attributes:
        seconds: since it was made.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def result(self, future: "Future[T]") -> T:
        """What a future gives; the time until then counts."""
        begin = time.monotonic()
        try:
            return future.result()
        finally:
            self.seconds += time.monotonic() - begin


def prefetch(
    read: Callable[[int], T],
    first: int,
    end: int,
    ahead: int = 1,
    threads: int = 1,
    waited: Waited | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield (step, read(step)) for first <= step < end, in order, read ahead in threads.

    An error in `read` is raised where its step would have been yielded.

    Args:
        read: one step, also in several threads at a time if there are.
        first, end: steps.
        ahead: steps read while one is computed, at least 1; so many results wait at most.
        threads: of which each reads a step.
        waited: told how long the caller waits.
    """
    assert min(ahead, threads) >= 1, f"{ahead} steps ahead in {threads} threads"
    clock = waited or Waited()
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="prefetch")
    try:
        reading = deque(pool.submit(read, step) for step in range(first, min(first + ahead, end)))
        for step in range(first, end):
            item = clock.result(reading.popleft())
            if step + ahead < end:
                reading.append(pool.submit(read, step + ahead))
            yield step, item
    finally:  # also when the caller goes no further: what nobody waits for is not begun
        pool.shutdown(wait=True, cancel_futures=True)
