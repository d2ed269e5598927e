"""The windows a stream holds: the one in use, the next, and no more than need be."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from ldm_core.reading.loading import Window

KEPT = 3  # of a stream that jumps about; one that goes straight on holds two


class Held:
    """Windows of one lane and bucket, for threads that may be some steps apart.

    A window goes when all its samples were taken, or when it is the oldest of more than `KEPT`.
    """

    def __init__(self) -> None:
        self._windows: OrderedDict[Hashable, Future[Window]] = OrderedDict()
        self._left: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, submit: Callable[[], Future[Window]]) -> Window:
        """A window, read if it is not held, or if reading it ahead has failed, perhaps long ago.

        Raises:
            Whatever its reading raised, which the next call tries again.
        """
        with self._lock:
            ahead = self._windows.get(key)
            if ahead is not None and ahead.done() and (ahead.cancelled() or ahead.exception()):
                del self._windows[key]
        future = self.begin(key, submit)
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._windows.get(key) is future:
                    del self._windows[key]
            raise

    def begin(self, key: Hashable, submit: Callable[[], Future[Window]]) -> Future[Window]:
        """See to it that a window is being read."""
        with self._lock:
            future = self._windows.get(key)
            if future is None:
                future = self._windows[key] = submit()
                while len(self._windows) > KEPT:
                    gone, _ = self._windows.popitem(last=False)
                    self._left.pop(gone, None)
        return future

    def took(self, key: Hashable, count: int, total: int) -> None:
        """So many samples of a window's total are used up."""
        with self._lock:
            self._left[key] = self._left.get(key, total) - count
            if self._left[key] <= 0:
                del self._left[key]
                self._windows.pop(key, None)

    @property
    def bytes(self) -> int:
        """Of the windows that are in memory."""
        with self._lock:
            futures = list(self._windows.values())
        done = [each for each in futures if each.done() and not each.exception()]
        return sum(each.result().bytes for each in done)
