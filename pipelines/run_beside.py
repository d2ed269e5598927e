"""A run that is told beside training, which never waits for the tracking server.

What the server has not heard is sent again until it has; a training's checkpoints hold what was
still to be told when they were saved, so that a killed worker's figures are told by the next one.
MLflow's own asynchronous logging forgets what fails, and what waits when its process is killed.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from pipelines.credentials import masked
from pipelines.tracking import Run

MOST_WAITING = 1_000  # entries, which every checkpoint holds; of more, the oldest are left out
ARTIFACT_TRIES = 6  # of pictures and documents, behind which figures wait
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0


@dataclass(frozen=True, eq=False)
class Item:
    """Something to be sent.

    Attributes:
        send: raises if it has not arrived.
        entry: what to keep in a checkpoint, as JSON; None of what is not worth it.
        tries: after so many it is left out; None sends it until it has arrived.
    """

    send: Callable[[], None]
    entry: Mapping[str, Any] | None = None
    tries: int | None = None


class Outbox:
    """Sends items in their order, in a thread; one that fails is sent again until it arrives.

    Args:
        refused: whether an error is of the item, which is then left out, and not of the way.
        told: is given a line when nothing arrives, when it does again, and when the first item of
            many is lost: the next such line is after all others have arrived.
        first_pause_s: before an item is sent again; pauses double up to LONGEST_PAUSE_S.
        most: items that wait.
    """

    def __init__(
        self,
        refused: Callable[[Exception], bool],
        told: Callable[[str], None],
        first_pause_s: float = FIRST_PAUSE_S,
        most: int = MOST_WAITING,
    ) -> None:
        self.refused, self.told = refused, told
        self.first_pause_s, self.most = first_pause_s, most
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._overflowing = False

    def put(self, item: Item) -> None:
        """Have something sent; returns at once."""
        with self._changed:
            full = len(self._items) == self.most
            if full:
                self._items.popleft()
            news, self._overflowing = full and not self._overflowing, full or self._overflowing
            self._items.append(item)
            if not self._thread:
                self._thread = threading.Thread(target=self._work, daemon=True, name="outbox")
                self._thread.start()
            self._changed.notify_all()
        if news:
            self.told(f"more than {self.most} entries wait for the tracking server: the oldest go")

    def waiting(self) -> list[Mapping[str, Any]]:
        """Entries that have not arrived, the one on its way with them."""
        with self._changed:
            return [item.entry for item in self._items if item.entry is not None]

    def flush(self, seconds: float) -> bool:
        """Wait until all has arrived, or for so long; returns whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._items, seconds)

    def close(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while item := self._first():
            self._send(item)
            with self._changed:
                if self._items and self._items[0] is item:  # else it was one too many
                    self._items.popleft()
                self._overflowing = self._overflowing and bool(self._items)
                self._changed.notify_all()

    def _first(self) -> Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return None if self._closed else self._items[0]

    def _send(self, item: Item) -> None:
        """Until it has arrived or is refused, was tried often enough, or the outbox is closed."""
        pause, tries = self.first_pause_s, 0
        while not self._closed:
            tries += 1
            try:
                item.send()
            except Exception as error:  # whatever its client raises: training goes on
                if self.refused(error):
                    self.told(masked(f"the tracking server refuses {item.entry}: {error}"))
                    return
                if tries == item.tries:
                    self.told(masked(f"the tracking server is without an artifact: {error}"))
                    return
                if tries == 1:
                    self.told(masked(f"the tracking server does not answer, figures wait: {error}"))
            else:
                if tries > 1:
                    self.told("the tracking server answers again")
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


@dataclass(frozen=True)
class RunBeside(Run):
    """A run whose metrics, tags, pictures and documents are told from a thread.

    Use as a context manager.

    Sent to another process it is a plain run.
    """

    outbox: Outbox = field(compare=False)

    def __enter__(self) -> "RunBeside":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.outbox.close()

    def tell(self, entry: Mapping[str, Any]) -> None:
        """As a plain run, at some time."""
        self.outbox.put(Item(partial(self.plain.tell, entry), entry))

    def image(self, picture: np.ndarray, key: str, step: int = 0) -> None:
        """As a plain run, at some time; checkpoints do not keep it."""
        self._beside(partial(self.plain.image, picture, key, step))

    def document(self, value: Any, name: str) -> None:
        """As a plain run, at some time; checkpoints do not keep it."""
        self._beside(partial(self.plain.document, value, name))

    def _beside(self, send: Callable[[], None]) -> None:
        """What the artifacts' store never takes, figures do not wait for."""
        self.outbox.put(Item(send, tries=ARTIFACT_TRIES))

    def untold(self) -> list[Mapping[str, Any]]:
        """Entries that its server has not heard yet."""
        return self.outbox.waiting()

    @property
    def plain(self) -> Run:
        """The same run, told at once."""
        return Run(self.uri, self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        return Run, (self.uri, self.id)


def told_beside(run: Run, told: Callable[[str], None]) -> RunBeside:
    """The run, told from a thread; `told` is given a line when its server is away."""
    return RunBeside(run.uri, run.id, Outbox(run.refuses, told))
