"""Read the next batch while the present one is computed."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(read: Callable[[int], T], first: int, end: int) -> Iterator[tuple[int, T]]:
    """Yield (step, read(step)) for first <= step < end, one step ahead in a thread of its own.

    An error in `read` is raised where its step would have been yielded.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(read, first) if first < end else None
        for step in range(first, end):
            assert ahead is not None
            item = ahead.result()
            ahead = pool.submit(read, step + 1) if step + 1 < end else None
            yield step, item
