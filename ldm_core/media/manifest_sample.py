"""A few rows of manifests that are too long for a dry run to list them all."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq

from ldm_core.media.caption_tables import parquet_errors
from ldm_core.media.entries import Candidate, Listing, sort_out
from ldm_core.media.manifests import list_manifests
from ldm_core.media.places import READERS, Place

GROUPS = 32  # row groups that rows are taken from; stretches in which captions are counted


@dataclass(frozen=True)
class Sampled:
    """Some rows in place of all.

    Attributes:
        listing: of some rows.
        rows: how many.
        total: rows of all manifests.
        captions: distinct ones of these rows.
        lone: those of them that one stretch of the rows alone has.
    """

    listing: Listing
    rows: int
    total: int
    captions: int = 0
    lone: int = 0

    @property
    def whole(self) -> bool:
        """Whether they are all."""
        return self.rows == self.total

    @property
    def times(self) -> float:
        """All rows to these."""
        return self.total / self.rows

    @property
    def caption_times(self) -> float:
        """The distinct captions of all rows to those of these, at most.

        lone / rows is how many new captions a further row brings, as Good and Turing have it (Good
        1953), by stretches of rows in place of rows (Chao et al. 2014,
        https://doi.org/10.1890/13-0133.1), so that the copies of a caption may lie side by side.
        It falls as more is seen, which nobody can foretell: here it stays as it is.
        """
        return 1 + (self.total - self.rows) * self.lone / self.rows / max(self.captions, 1)


def sample_manifests(place: Place, most: int) -> Sampled | None:
    """About `most` rows, from row groups that are spread evenly over Parquet manifests; None if
    they have no more than that, or are not all Parquet.

    Only footers and the groups chosen are read, and only the chosen files are looked up.

    Raises:
        UserError: a manifest that cannot be read or lacks a column.
    """
    groups = _row_groups(place)
    total = sum(rows for _, _, rows in groups)
    if total <= most or place.ending(".jsonl", ".csv"):
        return None
    chosen: defaultdict[str, dict[int, int]] = defaultdict(dict)
    count = min(GROUPS, len(groups))
    for k in range(count):
        id, group, rows = groups[k * len(groups) // count]
        chosen[id][group] = min(rows, -(-most // count))
    seen = _Captions(_rows(chosen))
    listing = sort_out(seen.watched(list_manifests(place, chosen)))
    return Sampled(listing, _rows(chosen), total, len(seen.stretch), seen.lone)


class _Captions:
    """In which of `GROUPS` equal stretches of some rows each caption comes.

    Attributes:
        stretch: number of it by caption; -1 of several.
    """

    def __init__(self, rows: int) -> None:
        self.stretch: dict[str, int] = {}
        self._rows = rows

    @property
    def lone(self) -> int:
        """How many captions are of one stretch alone."""
        return sum(number >= 0 for number in self.stretch.values())

    def watched(self, rows: Iterable[Candidate]) -> Iterator[Candidate]:
        """The same rows."""
        for k, row in enumerate(rows):
            here = k * GROUPS // self._rows
            for text, _ in row.pairs:
                if self.stretch.setdefault(text, here) != here:
                    self.stretch[text] = -1
            yield row


def _row_groups(place: Place) -> list[tuple[str, int, int]]:
    """Manifest, row group and its rows, in their order; empty ones are left out."""
    ids = place.ending(".parquet")
    with ThreadPoolExecutor(READERS) as readers:
        footers = readers.map(lambda id: _group_sizes(place, id), ids)
        return [
            (id, group, rows)
            for id, sizes in zip(ids, footers, strict=True)
            for group, rows in enumerate(sizes)
            if rows
        ]


def _group_sizes(place: Place, id: str) -> list[int]:
    """Rows of each row group, as the footer tells."""
    with place.fs.open(place.files[id].path, "rb") as stream, parquet_errors(id):
        metadata = pq.read_metadata(stream)
        return [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]


def _rows(chosen: Mapping[str, Mapping[int, int]]) -> int:
    return sum(rows for groups in chosen.values() for rows in groups.values())
