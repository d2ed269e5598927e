"""The child process of a `GuardedDecoder`, run by `python -m` with descriptors and a process id."""

import ctypes
import os
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ldm_core.errors import BadMedia
from ldm_core.media.guarded_channel import Channel

_PR_SET_PDEATHSIG = 1


def main(turns: int, file: int, parent: int) -> None:
    """Answer requests until the parent hangs up; an answer is (whether it went well, value)."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the parent decides
    channel = Channel(Connection(turns), file)
    try:
        function, memory_bytes = channel.receive()
        loaded = _import(channel, function)
        channel.pass_turn()
        _limit(memory_bytes)
        while loaded:
            _answer(channel, loaded, channel.receive())
            channel.pass_turn()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end_with(parent: int) -> None:
    """Be killed when the parent ends, even in the middle of a call that never returns.

    A closed connection would be noticed between calls only. To the kernel the parent is the
    thread that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit()


def _limit(memory_bytes: int) -> None:
    """Bound the address space to what is mapped by now and `memory_bytes` more."""
    pages = Path("/proc/self/statm")
    mapped = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # crashes should not fill the disk


def _import(channel: Channel, function: bytes) -> Callable[..., Any] | None:
    """The function, or none; an answer that says so."""
    try:
        loaded = pickle.loads(function)
    except Exception as error:
        channel.write((False, _portable(error)))
        return None
    channel.write((True, None))
    return loaded


def _answer(channel: Channel, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        channel.write((True, function(*arguments)))
    except Exception as error:  # of the function, or of a result that cannot be pickled
        # A decoder may have taken a lack of memory for damage.
        lacking = isinstance(error, BadMedia) and isinstance(error.__cause__, MemoryError)
        channel.write((False, _portable(error.__cause__ if lacking else error)))


def _portable(error: BaseException | None) -> BaseException:
    """The error, if it survives the way, or else another that tells of it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
