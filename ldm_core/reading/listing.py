"""The samples of a step by name and number, without their latents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm_core.reading.byte_cache import ByteCache
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.loading import part_rows
from ldm_core.reading.order import Key, Order, Stretch
from ldm_core.reading.row_groups import TableFiles

_IDS_BYTES = 64 * 2**20
_ID_BYTES = 100  # about what one takes as a str
_WINDOWS = 64


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples: (n,) int64 each.

    Attributes:
        source: number of the store.
        group: row group of its samples.
        row: in the row group.
        turn: pass of the store.
    """

    source: np.ndarray
    group: np.ndarray
    row: np.ndarray
    turn: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: slice) -> "Rows":
        return Rows(self.source[index], self.group[index], self.row[index], self.turn[index])

    @staticmethod
    def cat(parts: Sequence["Rows"]) -> "Rows":
        """One after the other."""
        columns = ([part.source, part.group, part.row, part.turn] for part in parts)
        return Rows(*(np.concatenate(column) for column in zip(*columns, strict=True)))


class Listing:
    """What the order means in the stores' rows."""

    def __init__(self, indexes: Sequence[StoreIndex], order: Order, seed: int) -> None:
        self._indexes, self._order, self._seed = indexes, order, seed
        self._files = [TableFiles(index.samples.groups.uri) for index in indexes]
        self._window = lru_cache(maxsize=max(_WINDOWS, 2 * order.lanes))(self._rows_of)
        self._ids: ByteCache[list[str]] = ByteCache(_IDS_BYTES)

    def rows(self, stretches: Iterable[Stretch]) -> Rows:
        """The samples of some stretches."""
        return Rows.cat([self._window(each.key)[each.start : each.end] for each in stretches])

    def ids(self, rows: Rows) -> list[str]:
        """Of samples; reads no other column."""
        triples = zip(rows.source.tolist(), rows.group.tolist(), rows.row.tolist(), strict=True)
        return [self._group_ids(source, group)[row] for source, group, row in triples]

    def _rows_of(self, key: Key) -> Rows:
        found = []
        for part in self._order.parts(key):
            samples = self._indexes[part.source].samples
            row = part_rows(samples, self._seed, part).astype(np.int64)
            same = (part.source, int(samples.group[part.unit]), part.turn)
            source, group, turn = (np.full(len(row), value, np.int64) for value in same)
            found.append(Rows(source, group, row, turn))
        all_rows = Rows.cat(found)
        order = self._order.shuffle(key)
        return Rows(
            all_rows.source[order], all_rows.group[order], all_rows.row[order], all_rows.turn[order]
        )

    def _group_ids(self, source: int, group: int) -> list[str]:
        def load() -> tuple[list[str], int]:
            place = self._indexes[source].samples.groups.place(group)
            ids = self._files[source].read(place, ("id",))["id"].to_pylist()
            return ids, _ID_BYTES * len(ids)

        return self._ids.get((source, group), load)
