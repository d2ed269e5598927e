"""`ldm schedule --kind local`: a stage on this machine whenever its time comes, until stopped.

One run at a time: a time that comes while a run lasts is skipped. A failed run is counted and
the next one tried: every stage goes on from what is finished.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

LONGEST_SLEEP_S = 60  # the clock may be set, and a laptop may sleep, while we do
END_S = 30  # that an interrupted run has before it is killed


@dataclass(frozen=True)
class Tally:
    """What became of the runs so far."""

    runs: int = 0
    failed: int = 0

    def after(self, code: int) -> "Tally":
        """The same with one more run, which ended with this exit code."""
        return Tally(self.runs + 1, self.failed + (code != 0))

    def __str__(self) -> str:
        return f"{self.failed} of {self.runs} runs failed"


def run_loop(
    times: Iterator[datetime],
    now: Callable[[], datetime],
    sleep: Callable[[float], None],
    run: Callable[[], int],
    runs: int | None = None,
) -> Tally:
    """Run at each of the times.

    Args:
        times: when to run, in order.
        now: the clock.
        sleep: waits for so many seconds.
        run: does it, and returns its exit code.
        runs: after how many to stop; None goes on for ever.
    """
    tally = Tally()
    for time, skipped in islice(upcoming(times, now), runs):
        if skipped:
            _say(f"{skipped} skipped, which came while the last run lasted")
        _say(f"next run at {time:%Y-%m-%d %H:%M %Z}")
        _wait_until(time, now, sleep)
        code = run()
        tally = tally.after(code)
        _say(f"run {tally.runs} " + (f"failed with exit code {code}; {tally}" if code else "done"))
    return tally


def upcoming(
    times: Iterator[datetime], now: Callable[[], datetime]
) -> Iterator[tuple[datetime, int]]:
    """Each time still to come at the moment of asking, and how many had gone by before it."""
    skipped = 0
    for time in times:
        if time < now():
            skipped += 1
            continue
        yield time, skipped
        skipped = 0


def run_child(command: Sequence[str]) -> int:
    """Exit code of the command, run in a process of its own.

    It gets a session of its own too: Ctrl-C then reaches us alone, and we pass it on once.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return child.wait()
    finally:
        if child.returncode is None:
            _end(child)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Within it, SIGTERM ends us as Ctrl-C does."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _wait_until(
    time: datetime, now: Callable[[], datetime], sleep: Callable[[float], None]
) -> None:
    while (left := (time - now()).total_seconds()) > 0:
        sleep(min(left, LONGEST_SLEEP_S))


def _end(child: subprocess.Popen[bytes]) -> None:
    """Interrupt the run, which then ends cleanly; kill what is left of it if it does not."""
    child.send_signal(signal.SIGINT)
    try:
        with suppress(subprocess.TimeoutExpired):
            child.wait(END_S)
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _say(message: str) -> None:
    print(f"[schedule] {message}", flush=True)
