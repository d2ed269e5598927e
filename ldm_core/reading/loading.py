"""Windows in memory, read ahead of their use by threads.

A window's arrays are filled in its shuffled order, row group by row group, so that a batch is a
slice and a decoded row group lives no longer than it takes to copy it.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm_core.reading.byte_cache import ByteCache
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.row_groups import TableFiles
from ldm_core.reading.sample_index import COLUMNS as SAMPLE_COLUMNS
from ldm_core.reading.sample_index import SampleIndex
from ldm_core.reading.sample_rows import decode_samples, drawn_captions
from ldm_core.reading.shuffles import shuffled
from ldm_core.reading.text_index import COLUMNS as TEXT_COLUMNS
from ldm_core.reading.text_rows import (
    POOLED,
    TOKENS,
    TextGroup,
    Texts,
    decode_texts,
    join_texts,
    pick_texts,
)
from ldm_core.reading.windows import Part

AHEAD = 4  # row groups of texts on their way to one window
CLOSE_S = 10.0  # that the end waits for reads under way

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """The samples of a window, shuffled.

    Attributes:
        means, logvars: (n, *shape) float16.
        keys: (n,) int64, of the samples' ids.
        turns: (n,) int64, pass of each sample's store.
        texts: the captions drawn, each once.
        text: (n,) int64, which of them is each sample's.
    """

    means: Tensor
    logvars: Tensor
    keys: Tensor
    turns: Tensor
    texts: Texts
    text: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def bytes(self) -> int:
        """In memory."""
        tensors = (self.means, self.logvars, self.keys, self.turns, self.text)
        return self.texts.bytes + sum(each.nbytes for each in tensors)


class Loader:
    """Reads parts of stores; any number of threads may ask.

    Args:
        indexes: of the stores.
        seed: of the run.
        text_bytes: of row groups of texts that are kept.
        threads: that read.
        patience_s: that an object store may be away.

    Attributes:
        texts: the row groups of texts that are kept.
    """

    def __init__(
        self,
        indexes: Sequence[StoreIndex],
        seed: int,
        text_bytes: int,
        threads: int,
        patience_s: float,
    ) -> None:
        self._indexes, self._seed = indexes, seed
        self._samples = [TableFiles(each.samples.groups.uri, patience_s) for each in indexes]
        self._texts = [TableFiles(each.texts.groups.uri, patience_s) for each in indexes]
        self.texts: ByteCache[TextGroup] = ByteCache(text_bytes)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row-groups")
        self._windows = ThreadPoolExecutor(threads, thread_name_prefix="windows")

    def close(self) -> None:
        """Begin nothing more, and wait for what is being read, but not for long: a bucket that is
        away is asked for minutes.
        """
        closing = threading.Thread(target=self._close, name="closing", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _close(self) -> None:
        for pool in (self._windows, self._pool):
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, load: Callable[[], Window]) -> Future[Window]:
        """Read a window in a thread."""
        return self._windows.submit(load)

    def load(self, parts: Sequence[Part], order: np.ndarray, shape: tuple[int, ...]) -> Window:
        """Read a window.

        Args:
            parts: of it.
            order: (n,) which of the parts' rows, laid end to end, comes at each place.
            shape: of a latent.
        """
        slots = np.empty_like(order)
        slots[order] = np.arange(len(order))
        draft = _Draft.empty(len(order), shape)
        _all(self._pool, [self._task(part, slots, draft) for part in parts])
        texts, text = self._join(parts, slots, draft.hashes)
        return Window(
            means=torch.from_numpy(draft.means),
            logvars=torch.from_numpy(draft.logvars),
            keys=torch.from_numpy(draft.keys),
            turns=torch.from_numpy(draft.turns),
            texts=texts,
            text=text,
        )

    def text(self, source: int, hashes: np.ndarray) -> Texts:
        """Embeddings of captions (T,) by a store's texts."""
        index = self._indexes[source].texts
        places = {name: index.find(name, hashes) for name in (TOKENS, POOLED)}

        def load(groups: Sequence[int]) -> Iterator[TextGroup]:
            return _ahead(self._pool, partial(self._text_group, source), groups)

        return pick_texts(load, places[TOKENS], places[POOLED])

    def ids(self, source: int, group: int) -> list[str]:
        """The sample ids of a row group."""
        place = self._indexes[source].samples.groups.place(group)
        return list(self._samples[source].read(place, ("id",))["id"].to_pylist())

    def _task(self, part: Part, slots: np.ndarray, draft: "_Draft") -> Callable[[], None]:
        def fill() -> None:
            samples = self._indexes[part.source].samples
            place = samples.groups.place(int(samples.group[part.unit]))
            rows = part_rows(samples, self._seed, part)
            table = self._samples[part.source].read(place, SAMPLE_COLUMNS)
            found = decode_samples(table, rows, draft.shape)
            to = slots[part.offset : part.offset + part.count]
            draft.means[to] = found.means[found.rows]
            draft.logvars[to] = found.logvars[found.rows]
            draft.keys[to], draft.turns[to] = found.keys.numpy(), part.turn
            draft.hashes[to] = drawn_captions(found, self._seed, part.turn)

        return fill

    def _join(
        self, parts: Sequence[Part], slots: np.ndarray, hashes: np.ndarray
    ) -> tuple[Texts, Tensor]:
        """The texts of each store's captions, and which of them is each sample's."""
        source = np.empty(len(slots), np.int64)
        for part in parts:
            source[slots[part.offset : part.offset + part.count]] = part.source
        found, text, count = [], np.empty(len(slots), np.int64), 0
        for number in np.unique(source).tolist():
            here = source == number
            distinct, which = np.unique(hashes[here], return_inverse=True)
            found.append(self.text(number, distinct))
            text[here] = count + which
            count += len(distinct)
        return join_texts(found), torch.from_numpy(text)

    def _text_group(self, source: int, group: int) -> TextGroup:
        def load() -> tuple[TextGroup, int]:
            place = self._indexes[source].texts.groups.place(group)
            found = decode_texts(self._texts[source].read(place, TEXT_COLUMNS))
            return found, found.bytes

        return self.texts.get((source, group), load)


def part_rows(samples: SampleIndex, seed: int, part: Part) -> np.ndarray:
    """Which rows of its row group a part has, in their order."""
    count = int(samples.count[part.unit])
    order = shuffled(count, seed, "rows", part.source, part.unit, part.turn)
    chosen = order[part.first : part.first + part.count]
    rows = samples.rows(part.unit)
    return chosen if isinstance(rows, slice) else rows[chosen].astype(np.int64)


@dataclass(frozen=True)
class _Draft:
    """A window's arrays while they are filled."""

    means: np.ndarray
    logvars: np.ndarray
    keys: np.ndarray
    turns: np.ndarray
    hashes: np.ndarray

    @classmethod
    def empty(cls, count: int, shape: tuple[int, ...]) -> "_Draft":
        return cls(
            means=np.empty((count, *shape), np.float16),
            logvars=np.empty((count, *shape), np.float16),
            keys=np.empty(count, np.int64),
            turns=np.empty(count, np.int64),
            hashes=np.empty(count, np.uint64),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.means.shape[1:]


def _ahead(pool: ThreadPoolExecutor, load: Callable[[K], T], keys: Sequence[K]) -> Iterator[T]:
    """What `load` gives for each key, in order; `AHEAD` of them are read or wait to be used."""
    futures: deque[Future[T]] = deque()
    for key in keys:
        futures.append(pool.submit(load, key))
        if len(futures) > AHEAD:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def _all(pool: ThreadPoolExecutor, tasks: Sequence[Callable[[], None]]) -> None:
    """Run all; raise the first error when none of them runs any more."""
    futures = [pool.submit(task) for task in tasks]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
