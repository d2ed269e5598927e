"""The units of a store's `samples`: rows of one bucket in one row group, in canonical order.

A file of `ldm encode` has one bucket; a row group that a compaction or a deletion has made of
several files may mix them, and is then several units. The order is that of buckets and first ids:
what files are called does not matter, only what is in them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm_core.errors import UserError
from ldm_core.latents.schema import SAMPLES
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.groups import Groups, find_groups
from ldm_core.reading.row_groups import Place, TableFiles, as_schema, leaves

COLUMNS = ("id", "latent_mean", "latent_logvar", "captions")

_ALL = slice(None)
# parquet-rs, which wrote what a deletion left, cuts its statistics.
_EXACT_WRITER = "parquet-cpp"


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """U units of G row groups.

    Attributes:
        groups: of the table.
        buckets: names, sorted.
        group: (U,) int32.
        bucket: (U,) int16, number of the name.
        count: (U,) int32, samples.
        mixed: which rows of its row group a unit is, where it is not all of them.
        shapes: of each bucket's latents, (C, h, w) or (C, T, h, w).
        digest: 16 hex digits; the same units in the same order have the same.
    """

    groups: Groups
    buckets: tuple[str, ...]
    group: np.ndarray
    bucket: np.ndarray
    count: np.ndarray
    mixed: dict[int, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    digest: str

    @property
    def main(self) -> str:
        """The bucket of most samples."""
        counts = np.bincount(self.bucket, self.count, len(self.buckets))
        return self.buckets[int(counts.argmax())]

    def rows(self, unit: int) -> np.ndarray | slice:
        """Which rows of its row group a unit is."""
        return self.mixed.get(unit, _ALL)

    def units(self, bucket: str) -> np.ndarray:
        """The units of a bucket, int32, in canonical order."""
        if bucket not in self.buckets:
            return np.zeros(0, np.int32)
        here = self.bucket == self.buckets.index(bucket)
        return np.flatnonzero(here).astype(np.int32)


@dataclass(frozen=True)
class _Found:
    """The rows of one bucket in a row group; None is all of them."""

    bucket: str
    first: str
    last: str
    count: int
    rows: np.ndarray | None = None


def index_samples(version: StoreVersion) -> SampleIndex:
    """Look at the footers of a version's `samples`.

    Raises:
        UserError: there is no sample.
    """
    groups, found = find_groups(version, "samples", COLUMNS, _look)
    units = [(unit, group) for group, parts in enumerate(found) for unit in parts]
    if not units:
        raise UserError(
            f"{version.store.uri} version {version.number} has no sample: see its table rejects, "
            "and run `ldm encode` on other pictures"
        )
    units.sort(key=lambda pair: (pair[0].bucket, pair[0].first, pair[0].last, pair[0].count))
    names = tuple(sorted({unit.bucket for unit, _ in units}))
    place = {name: k for k, name in enumerate(names)}
    bucket = np.array([place[unit.bucket] for unit, _ in units], np.int16)
    group = np.array([group for _, group in units], np.int32)
    firsts = [int(np.argmax(bucket == k)) for k in range(len(names))]
    return SampleIndex(
        groups=groups,
        buckets=names,
        group=group,
        bucket=bucket,
        count=np.array([unit.count for unit, _ in units], np.int32),
        mixed={k: unit.rows for k, (unit, _) in enumerate(units) if unit.rows is not None},
        shapes={
            name: _shape(groups.place(int(group[k])), units[k][0], groups.uri)
            for name, k in zip(names, firsts, strict=True)
        },
        digest=_digest(unit for unit, _ in units),
    )


def _look(files: TableFiles, place: Place, footer: pq.FileMetaData) -> list[_Found]:
    """The units of a row group: from its statistics, or where they do not tell from its rows."""
    group = footer.row_group(place.number)
    if not group.num_rows:
        return []
    if footer.created_by.startswith(_EXACT_WRITER):
        ids, buckets = (
            group.column(leaf).statistics
            for name in ("id", "bucket")
            for leaf in leaves(footer, (name,))
        )
        told = all(each is not None and each.has_min_max for each in (ids, buckets))
        if told and buckets.min == buckets.max:
            return [_Found(buckets.min, ids.min, ids.max, group.num_rows)]
    return list(_split(files.read(place, ("id", "bucket"))))


def _split(rows: pa.Table) -> Iterator[_Found]:
    """A unit for each of the buckets among some rows."""
    rows = as_schema(rows, SAMPLES)
    names = pc.unique(rows["bucket"]).to_pylist()
    for name in sorted(names):
        here = np.flatnonzero(pc.equal(rows["bucket"], name).to_numpy())
        ids = rows["id"].take(pa.array(here))
        ends = pc.min_max(ids).as_py()
        kept = here.astype(np.int32) if len(names) > 1 else None
        yield _Found(name, ends["min"], ends["max"], len(here), kept)


def _shape(place: Place, unit: _Found, uri: str) -> tuple[int, ...]:
    row = 0 if unit.rows is None else int(unit.rows[0])
    somewhere = Place(place.path, place.bytes, place.number)  # other columns than `place` says
    return tuple(TableFiles(uri).read(somewhere, ("latent_shape",))["latent_shape"][row].as_py())


def _digest(units: Iterator[_Found]) -> str:
    digest = hashlib.sha256()
    for unit in units:
        text = "\0".join((unit.bucket, unit.first, unit.last, str(unit.count)))
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]
