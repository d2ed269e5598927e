"""A training's progress, clock and warnings, posted by its workers and read by the driver.

In a module of its own, as Ray imports what an actor's class is defined beside: this one needs
neither torch nor MLflow.
"""

import time

import ray

REPEATED_S = 60.0  # that a warning is not said again, whichever worker has it


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where workers write how far they are and what is amiss, and the driver reads it.

    It lives as long as the driver's command, whatever happens to the workers.
    """

    def __init__(self) -> None:
        self._first, self._state = 0, (0, "")
        self._lines: list[str] = []
        self._said: dict[str, float] = {}
        self._start = time.monotonic()
        self._earlier: float | None = None

    def begin(self, first: int, seconds: float) -> None:
        """A worker starts or goes on at this step, after so many seconds by its checkpoint.

        Only the first of them tells of earlier commands; after that this clock has run.
        """
        self._first = first
        if self._earlier is None:
            self._earlier = seconds

    def post(self, done: int, note: str) -> None:
        """Steps done so far and a short text."""
        self._state = (done, note)

    def warn(self, kind: str, line: str) -> None:
        """A line for the user, unless another of this kind was said within the minute."""
        now = time.monotonic()
        if now - self._said.get(kind, -REPEATED_S) >= REPEATED_S:
            self._said[kind] = now
            self._lines.append(line)

    def read(self) -> tuple[int, int, str]:
        """The step last begun at, and what was posted last."""
        return self._first, *self._state

    def warnings(self, heard: int) -> list[str]:
        """The lines after so many of them."""
        return self._lines[heard:]

    def earlier(self) -> float:
        """Seconds of earlier commands, up to the checkpoint that this one went on from."""
        return self._earlier or 0.0

    def seconds(self) -> float:
        """Of this command and the earlier ones."""
        return self.earlier() + time.monotonic() - self._start
