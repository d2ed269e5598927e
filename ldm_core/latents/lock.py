"""One writer at a time: a numbered lock in the store, renewed while its owner works.

```
<uri>/locks/00000007.json     owner, when it was last renewed, whether it was given back
```

A writer takes number n + 1, which only one can (put-if-absent), and only once number n was given
back or has not been renewed for `EXPIRY_S`. Nobody ever removes or replaces another's lock, so that
two who find the same dead owner cannot both take over from it, and an owner who was thought dead
finds out by the higher number, at the latest when it asks.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ldm_core.errors import UserError
from ldm_core.files import filesystem, join, read_bytes, remove, write_bytes
from ldm_core.latents.commit import put_if_absent

EXPIRY_S = 120.0
RENEWAL_S = 20.0
LOOK_S = 5.0  # between looks at a lock whose owner may be dead
_LOOKS = 5  # at a lock that others take and give back meanwhile

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host, pid: where it runs.
        since, renewed: seconds since 1970, by the owner's clock.
        released: whether it was given back.
        token: random, by which an owner knows its own lock again.
        machine: the boot of a kernel and a namespace of its process ids; none where unknown. Hosts
            of one name may be containers whose processes do not see each other.
        started: when the process began, ticks of the kernel's clock since that boot: a container
            that is started again may give another process the same id.
    """

    host: str
    pid: int
    since: float
    renewed: float
    released: bool = False
    token: str = ""
    machine: str = ""
    started: int = 0

    def alive(self, now: float, expiry: float = EXPIRY_S) -> bool:
        """Whether it may still be writing; an owner whose process this one would see is looked
        up."""
        if self.released or now - self.renewed > expiry:
            return False
        if not self.machine or self.machine != _machine():
            return True
        began = _started(self.pid)
        return _hidden(self.pid) if began is None else began == self.started


class LockHeld(UserError):
    """Another job holds the lock.

    Attributes:
        owner: of the lock.
    """

    def __init__(self, uri: str, owner: Owner) -> None:
        now = time.time()
        self.owner = owner
        super().__init__(
            f"{uri} is being written by process {owner.pid} on {owner.host} for "
            f"{now - owner.since:.0f} s (renewed {now - owner.renewed:.0f} s ago): wait until it "
            f"ends, or end it; a lock that is not renewed for {EXPIRY_S:.0f} s is taken over"
        )


class StoreLock:
    """A lock that was taken.

    Attributes:
        uri: of the store.
        number: of the lock.
    """

    def __init__(self, uri: str, number: int, owner: Owner) -> None:
        self.uri, self.number, self.owner = uri, number, owner
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="store lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that it is still ours.

        Raises:
            UserError: it was not renewed for so long that another job took over.
        """
        newest = max(_numbers(self.uri), default=0)
        if newest > self.number:
            raise UserError(
                f"another job took over {self.uri} (lock {newest}; ours is {self.number}), as this "
                "one could not renew its lock: what it committed stays; run it again when the "
                "other has ended"
            )

    def release(self) -> None:
        """Give it back; the numbers before it are of no more use."""
        self._stop.set()
        self._thread.join()
        with suppress(OSError):  # a storage that is full or away: it is as if the owner had died
            self._write(replace(self.owner, renewed=time.time(), released=True))
            for number in _numbers(self.uri):
                if number < self.number:
                    remove(_lock_uri(self.uri, number))

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL_S):
            try:
                self._write(replace(self.owner, renewed=time.time()))
            except Exception as error:  # whatever it is may pass, and this thread must not end
                _log.warning("the lock of %s is not renewed: %s; trying on", self.uri, error)

    def _write(self, owner: Owner) -> None:
        write_bytes(_lock_uri(self.uri, self.number), _text(owner))


@contextmanager
def locked(uri: str, wait: bool = False) -> Iterator[StoreLock]:
    """Hold the store's lock.

    Args:
        uri: of the store.
        wait: for a sign that an owner on another machine lives, rather than believe its last one.

    Raises:
        LockHeld: another job holds it; names the owner and the lock's age.
    """
    lock = take_over(uri) if wait else take(uri)
    try:
        yield lock
    finally:
        lock.release()


def take_over(uri: str) -> StoreLock:
    """Take a lock as `take`, also where its owner may just have died on another machine: as long as
    nothing is heard of that one, wait until its lock has expired.

    Raises:
        UserError: it lives.
    """
    last: Owner | None = None
    while True:
        try:
            return take(uri)
        except LockHeld as held:
            heard_of = last is not None and held.owner != last
            here = held.owner.machine and held.owner.machine == _machine()
            if heard_of or here:
                raise
            if last is None:
                _log.warning("%s; waiting for a sign that it lives", held)
            last = held.owner
        time.sleep(LOOK_S)


def take(uri: str) -> StoreLock:
    """Take the store's lock, or raise as `locked` does."""
    now = time.time()
    owner = _this_process(now)
    for _ in range(_LOOKS):
        newest = max(_numbers(uri), default=0)
        holder = _read(uri, newest) if newest else None
        if newest and holder is None:
            continue  # a successor has come and cleaned up since: look again
        if holder and holder.alive(time.time()):
            raise LockHeld(uri, holder)
        try:
            put_if_absent(_lock_uri(uri, newest + 1), _text(owner))
        except FileExistsError:
            first = _read(uri, newest + 1)
            if first is None or first.token != owner.token:
                continue  # another was first: who holds it by now
            # else our own put, acknowledged too late and repeated
        return StoreLock(uri, newest + 1, owner)
    raise UserError(
        f"{uri}: its lock changed hands {_LOOKS} times while it was looked at; run this again"
    )


def _numbers(uri: str) -> list[int]:
    fs, folder = filesystem(join(uri, "locks"))
    try:
        names = [path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)]
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def _read(uri: str, number: int) -> Owner | None:
    try:
        return Owner(**json.loads(read_bytes(_lock_uri(uri, number))))
    except FileNotFoundError:  # its successor cleaned up
        return None


def _lock_uri(uri: str, number: int) -> str:
    return join(uri, "locks", f"{number:08d}.json")


def _text(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner)) + "\n").encode()


def _this_process(now: float) -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=now,
        renewed=now,
        token=uuid.uuid4().hex,
        machine=_machine(),
        started=_started(os.getpid()) or 0,
    )


def _machine() -> str:
    """The boot and the namespace of process ids; none where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process began; -1 if it is dead and not yet buried, None if nothing is known of it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text.rsplit(")", 1)[-1].split()  # the third, the state, and those after it
    return -1 if fields[0] == "Z" else int(fields[19])


def _hidden(pid: int) -> bool:
    """Whether there is such a process, of another user: /proc may be mounted to show one's own."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return False  # it ended, or began, between the two looks
