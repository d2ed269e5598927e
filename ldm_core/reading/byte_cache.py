"""A cache of so many bytes, for threads: what is asked for twice at a time is loaded once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    value: Future[T]
    bytes: int = 0


class ByteCache(Generic[T]):
    """The least recently used goes first; a value larger than the limit is not kept at all.

    Attributes:
        limit: bytes of what is kept.
        bytes: of what is kept now.
        loads: how often something was loaded.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.loads = limit, 0, 0
        self._entries: OrderedDict[Hashable, _Entry[T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], tuple[T, int]]) -> T:
        """The value of a key; `load` gives it and its bytes where it is not kept.

        An error of `load` is raised for all who wait for it, and not kept.
        """
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._entries[key] = _Entry(Future())
                self.loads += 1
            self._entries.move_to_end(key)
        if mine:
            self._load(key, entry, load)
        return entry.value.result()

    def peek(self, key: Hashable) -> T | None:
        """The value, if it is kept."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.value.done():
                return None
            self._entries.move_to_end(key)
        return entry.value.result()

    def _load(self, key: Hashable, entry: _Entry[T], load: Callable[[], tuple[T, int]]) -> None:
        try:
            value, size = load()
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            entry.value.set_exception(error)
            return
        with self._lock:
            entry.bytes = size
            self.bytes += size
            entry.value.set_result(value)
            self._evict()

    def _evict(self) -> None:
        done = [key for key, entry in self._entries.items() if entry.value.done()]
        for key in done:
            if self.bytes <= self.limit:
                return
            self.bytes -= self._entries.pop(key).bytes
