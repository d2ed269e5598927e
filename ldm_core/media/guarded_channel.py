"""What a `GuardedDecoder` and its child talk through: two processes that take turns."""

import os
import pickle
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

KEPT_BYTES = 32 << 20  # of memory between two values; what is larger is given back


@dataclass(frozen=True)
class Channel:
    """Values travel through a file in memory, whose turn it is through a socket.

    A socket takes 200 kB at a time, each a change of process: a picture of 512 pixels takes five
    times as long through one as through a file. Who has sent a value waits for the answer before
    sending another.
    """

    turns: Connection
    file: int  # descriptor

    def write(self, value: Any) -> None:
        """Write a value in place of what was written before; raises what pickling it raises."""
        os.lseek(self.file, 0, os.SEEK_SET)
        with open(self.file, "wb", closefd=False) as stream:
            pickle.dump(value, stream, pickle.HIGHEST_PROTOCOL)

    def pass_turn(self) -> None:
        """Let the other process read what is written.

        Raises:
            OSError: it has ended.
        """
        self.turns.send_bytes(b"!")

    def receive(self, seconds: float | None = None) -> Any:
        """Wait for the turn and read the value.

        Raises:
            TimeoutError: the turn did not come in time.
            EOFError, OSError: the other process has ended.
        """
        if not self.turns.poll(seconds):
            raise TimeoutError
        self.turns.recv_bytes()
        os.lseek(self.file, 0, os.SEEK_SET)
        with open(self.file, "rb", closefd=False) as stream:
            value = pickle.load(stream)
        if os.fstat(self.file).st_size > KEPT_BYTES:
            os.ftruncate(self.file, 0)
        return value

    def close(self) -> None:
        """Give back the file and hang up."""
        self.turns.close()
        os.close(self.file)


def file_in_memory() -> int:
    """Descriptor of a new, empty file without a name; on disk where the system has no other."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("guarded-channel")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
