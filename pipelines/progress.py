"""What the user sees of a stage: a bar with rate and ETA on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_EVERY_S = 10.0


class Progress:
    """Counts `done` of `total` units of one stage. Use as a context manager; safe from threads."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self._start = self._shown = time.monotonic()
        self._first: int | None = None
        self._said = 0
        self._last = -1
        self._bar = _rich_bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task(stage, total=total, note="") if self._bar else None

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def go_on_from(self, first: int) -> None:
        """Say, once for each, that earlier work finished `first` units."""
        if first != self._said:
            self._said = first
            print(f"[{self.stage}] goes on from {first} of {self.total} {self.unit}", flush=True)

    def say(self, line: str) -> None:
        """A line of its own."""
        print(f"[{self.stage}] {line}", flush=True)

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` units are finished; `note` is a short text such as the loss."""
        if done == self._last:
            return
        self._last = done
        if self._first is None:
            self._first = done  # units that an earlier run finished say nothing about the rate
        now = time.monotonic()
        rate = (done - self._first) / max(now - self._start, 1e-9)
        text = f"{rate:.1f} {self.unit}/s {note}".strip()
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, note=text)
        elif done >= self.total or now - self._shown >= PLAIN_EVERY_S:
            self._shown = now
            left = f"ETA {(self.total - done) / rate:.0f}s" if rate > 0 else "ETA ?"
            print(f"[{self.stage}] {done}/{self.total} {self.unit} {left} {text}", flush=True)


def _rich_bar() -> RichProgress:
    return RichProgress(
        TextColumn("[bold]{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
