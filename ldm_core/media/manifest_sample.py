"""A few rows of manifests that are too long for a dry run to list them all."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow.parquet as pq

from ldm_core.media.caption_tables import parquet_errors
from ldm_core.media.entries import Candidate, Listing, sort_out
from ldm_core.media.manifest_rows import head_rows
from ldm_core.media.manifests import list_manifests
from ldm_core.media.places import READERS, Place

T = TypeVar("T")

GROUPS = 32  # row groups or files rows are taken from; stretches in which captions are counted
LONG = 128 << 20  # bytes of JSON lines and CSV from which on they are not listed as a whole


@dataclass(frozen=True)
class Sampled:
    """Some rows in place of all.

    Attributes:
        listing: of some rows.
        rows: how many.
        total: rows of all manifests.
        captions: distinct ones of these rows.
        lone: those of them that one stretch of the rows alone has.
        about: whether `total` is measured by the length of these rows.
    """

    listing: Listing
    rows: int
    total: int
    captions: int = 0
    lone: int = 0
    about: bool = False

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
    """About `most` rows of manifests, or fewer; None if they are to be listed as a whole.

    Of Parquet, if there are more, from row groups that are spread evenly: only footers and the
    groups chosen are read. Of JSON lines and CSV, beyond `LONG` bytes, the first rows of files that
    are spread evenly. Only the chosen files are looked up.

    Raises:
        UserError: a manifest that cannot be read or lacks a column.
    """
    lines, tables = place.ending(".jsonl", ".csv"), place.ending(".parquet")
    if lines and tables:
        return None
    return _of_lines(place, lines, most) if lines else _of_tables(place, most)


def _of_tables(place: Place, most: int) -> Sampled | None:
    groups = _row_groups(place)
    total = sum(rows for _, _, rows in groups)
    if total <= most:
        return None
    chosen: defaultdict[str, dict[int, int]] = defaultdict(dict)
    some = _evenly(groups)
    for id, group, rows in some:
        chosen[id][group] = min(rows, -(-most // len(some)))
    return _sampled(place, chosen, total)


def _of_lines(place: Place, ids: Sequence[str], most: int) -> Sampled | None:
    size = sum(place.files[id].size or 0 for id in ids)
    some = _evenly(ids)
    heads = {id: head_rows(place, id) for id in some} if size > LONG else {}
    rows, length = (sum(head[k] for head in heads.values()) for k in range(2))
    if not rows:
        return None
    chosen = {id: {0: min(rows, -(-most // len(some)))} for id, (rows, _) in heads.items()}
    return replace(_sampled(place, chosen, round(size * rows / length)), about=True)


def _sampled(place: Place, chosen: Mapping[str, Mapping[int, int]], total: int) -> Sampled:
    rows = sum(rows for groups in chosen.values() for rows in groups.values())
    seen = _Captions(rows)
    listing = sort_out(seen.watched(list_manifests(place, chosen)))
    return Sampled(listing, rows, total, len(seen.stretch), seen.lone)


def _evenly(items: Sequence[T]) -> list[T]:
    """`GROUPS` of them, or all there are."""
    count = min(GROUPS, len(items))
    return [items[k * len(items) // count] for k in range(count)]


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
