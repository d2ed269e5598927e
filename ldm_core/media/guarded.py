"""Decoding in a child process that can be killed, so that no file can stop or fell its reader.

A guard against accidents, not a sandbox: a file that takes over the child can do what the child's
user can. The child is a plain subprocess: `multiprocessing` would import the caller's main module
into it, and its fork server would be one for the whole process.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe
from threading import Lock
from types import TracebackType
from typing import Any

from ldm_core.errors import BadMedia
from ldm_core.media.guarded_channel import Channel, file_in_memory

CHILD = "ldm_core.media.guarded_child"
# glibc gives the memory of a picture back and asks for it anew with the next one, which doubles
# the time of a picture of 512 pixels; a child that keeps it decodes as fast as its parent.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
START_SECONDS = 120  # to start Python and import what the function needs


class GuardedDecoder:
    """Calls one function in one long-lived child process, item after item.

    The child is started for the first item, and anew after one that was its last. Threads may
    share a decoder and take turns. The child ends with the `with` block, and with this process
    however that ends.

    Args:
        function: what decodes; importable by its name, as are all it needs.
        seconds: of one item, from sending it to the result.
        memory_bytes: of address space that the child may take beyond what it has once the
            function is imported: an item, the work, the result.
    """

    def __init__(self, function: Callable[..., Any], seconds: float, memory_bytes: int) -> None:
        self.seconds, self.memory_bytes = seconds, memory_bytes
        self._function = pickle.dumps(function)
        self._child: _Child | None = None
        self._lock = Lock()
        # The kernel ends a child with the thread that started it: see guarded_child.py.
        self._starter = ThreadPoolExecutor(1, "guarded-decoder")

    def __enter__(self) -> "GuardedDecoder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()
        self._starter.shutdown()

    def decode(self, item: Any, *more: Any) -> Any:
        """The function's result for an item.

        Raises:
            BadMedia: what the function raised; or stage "decode", reason "timeout", "crashed" or
                "out of memory".
            Exception: whatever else the function raised.
        """
        with self._lock:
            try:
                succeeded, value = self._exchange((item, *more))
            except BaseException:  # an interrupt too: an answer to this item may still come
                self._end()
                raise
        if succeeded:
            return value
        raise value

    def _exchange(self, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        child = self._running()
        child.channel.write(arguments)
        try:
            child.channel.pass_turn()
        except OSError:  # it ended while it had nothing to do, which is not this item's fault
            self._end()
            child = self._running()
            child.channel.write(arguments)
            child.channel.pass_turn()
        try:
            succeeded, value = child.channel.receive(self.seconds)
        except TimeoutError as error:
            raise BadMedia("decode", "timeout", f"more than {self.seconds:g} s") from error
        except (EOFError, OSError) as error:
            raise BadMedia("decode", "crashed", child.last_words()) from error
        if not succeeded and isinstance(value, MemoryError):
            self._end()  # nobody knows what the item has left behind
            raise BadMedia("decode", "out of memory", str(value)) from value
        return succeeded, value

    def _running(self) -> "_Child":
        if self._child and self._child.process.poll() is not None:
            self._end()
        if not self._child:
            self._child = self._starter.submit(_Child, self._function, self.memory_bytes).result()
            self._child.await_start()
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child:
            child.end()


class _Child:
    """The process and the channel to it."""

    def __init__(self, function: bytes, memory_bytes: int) -> None:
        ours, theirs = Pipe()
        self.channel = Channel(ours, file_in_memory())
        shared = [theirs.fileno(), self.channel.file]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", CHILD, *map(str, [*shared, os.getpid()])],
                pass_fds=shared,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **KEEP_MEMORY, "PYTHONPATH": _import_path()},
            )
        self.channel.write((function, memory_bytes))
        self.channel.pass_turn()

    def await_start(self) -> None:
        """Wait until the function is imported.

        Raises:
            RuntimeError: the child did not start.
            Exception: the import failed.
        """
        try:
            succeeded, value = self.channel.receive(START_SECONDS)
        except (TimeoutError, EOFError, OSError) as error:
            raise RuntimeError(f"no child process to decode in: {self.last_words()}") from error
        if not succeeded:
            raise value

    def last_words(self) -> str:
        """How the process ended, or that it had to be made to."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=1)
            return signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return "it does not answer"

    def end(self) -> None:
        """Kill the process and take note of its end, so that no zombie is left."""
        self.process.kill()
        self.process.wait()
        self.channel.close()


def _import_path() -> str:
    """What this process can import, the child can: a path may have been added by a program."""
    return os.pathsep.join(filter(None, sys.path))
