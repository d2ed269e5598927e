"""A few rows of manifests that are too long for a dry run to list them all."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.parquet as pq

from ldm_core.media.caption_tables import parquet_errors
from ldm_core.media.entries import Listing, sort_out
from ldm_core.media.manifests import list_manifests
from ldm_core.media.places import Place

GROUPS = 32  # row groups that rows are taken from


@dataclass(frozen=True)
class Sampled:
    """Some rows in place of all.

    Attributes:
        listing: of some rows.
        rows: how many.
        total: rows of all manifests.
    """

    listing: Listing
    rows: int
    total: int

    @property
    def whole(self) -> bool:
        """Whether they are all."""
        return self.rows == self.total


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
    return Sampled(sort_out(list_manifests(place, chosen)), _rows(chosen), total)


def _row_groups(place: Place) -> list[tuple[str, int, int]]:
    """Manifest, row group and its rows, in their order; empty ones are left out."""
    found = []
    for id in place.ending(".parquet"):
        with place.fs.open(place.files[id].path, "rb") as stream, parquet_errors(id):
            metadata = pq.read_metadata(stream)
            sizes = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
            found += [(id, group, rows) for group, rows in enumerate(sizes) if rows]
    return found


def _rows(chosen: Mapping[str, Mapping[int, int]]) -> int:
    return sum(rows for groups in chosen.values() for rows in groups.values())
