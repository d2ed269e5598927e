"""Some files set aside, which are never trained on: chosen by their ids, so that they stay.

A file is held out with all of its rows: clips of one video, a picture and its mirror image, are too
much alike for one to judge what was learnt from the other. Other stores that are mixed in leave out
the files of the same ids (`leave_out`).

As long as a store has no more than `_LOOKED_AT` samples, its next version holds out the same files
but for what came and went; of a larger one only some row groups are looked at, and only files that
lie in these as a whole are chosen.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ldm_core.errors import UserError
from ldm_core.latents.reader import sample_key
from ldm_core.random import uniform
from ldm_core.reading.groups import THREADS
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.row_groups import Place, TableFiles
from ldm_core.reading.sample_index import SampleIndex
from ldm_core.reading.shuffles import shuffled

_LOOKED_AT = 2**16  # samples whose ids are read, at least


def hold_out(index: StoreIndex, count: int, seed: int) -> tuple[StoreIndex, StoreIndex]:
    """An index of all samples but some `count`, and one of these.

    They are the rows of whole files, at most `count`: a file that has more than are still wanted is
    passed over. Only where every file has more than `count`, one of them is taken.

    Raises:
        UserError: more than half of the samples.
    """
    samples = index.samples
    total = int(samples.count.sum(dtype=np.int64))
    if not 0 < 2 * count <= total:
        raise UserError(
            f"{count} samples are to be held out of the {total} of {index.name}: at least 1, and "
            "at most half of them; set train.validation_samples"
        )
    some = _candidates(samples, 8 * count, seed)
    whole = len(some) == len(samples.group)
    found = _files(samples, some, whole)
    if not len(found.sizes):  # files lie scattered over the store
        found = _files(samples, np.arange(len(samples.group)), True)
    chosen = _chosen(found, count, seed)
    held = {u: rows for u, rows in _rows_of(found, chosen).items() if len(rows)}
    taken = sum(map(len, held.values()))
    if 2 * taken > total:
        largest = found.sources[int(chosen[0])]
        raise UserError(
            f"{largest!r} has {taken} of the {total} samples of {index.name}: "
            "too many to be held out, and a file is held out as a whole; encode more files, or set "
            "train.validation_samples=0"
        )
    return _without(index, held), replace(index, samples=_only(samples, (), held))


def sources_of(held: StoreIndex) -> pa.Array:
    """Ids of the files whose rows an index has; reads them."""
    units = range(len(held.samples.group))
    columns = [ids for _, ids, _ in _each(held.samples, units)]
    return pc.unique(pa.chunked_array(columns, pa.string()))


def leave_out(index: StoreIndex, sources: pa.Array) -> StoreIndex:
    """The index without the rows of some files; the same index if it has none of them.

    Reads one small column of all row groups.

    Raises:
        UserError: nothing remains.
    """
    held = {}
    for unit, ids, _ in _each(index.samples, range(len(index.samples.group))):
        here = pc.is_in(ids, value_set=sources).to_numpy(zero_copy_only=False)
        if here.any():
            held[unit] = _rows(index.samples, unit)[here]
    if sum(map(len, held.values())) == int(index.samples.count.sum(dtype=np.int64)):
        raise UserError(
            f"all files of {index.name} are held out of the recipe's own store: leave it out of "
            "train.mix, or set train.validation_samples=0"
        )
    return _without(index, held) if held else index


@dataclass(frozen=True, eq=False)
class _Files:
    """Files that may be chosen, and the rows that were looked at.

    Attributes:
        sources: ids of files.
        eligible: numbers of those that may be chosen.
        sizes: rows of each of these.
        unit, row: of each row that was looked at.
        file: number of its file.
    """

    sources: Sequence[str]
    eligible: np.ndarray
    sizes: np.ndarray
    unit: np.ndarray
    row: np.ndarray
    file: np.ndarray


def _files(samples: SampleIndex, units: np.ndarray, whole: bool) -> _Files:
    """The files in some units; those that are eligible have all their rows there.

    Args:
        samples: the units.
        units: to look at.
        whole: whether these are all.
    """
    looked = list(_each(samples, units.tolist()))
    rows = [_rows(samples, unit) for unit, _, _ in looked]
    told = pa.chunked_array([ids for _, ids, _ in looked], pa.string()).combine_chunks()
    coded = told.dictionary_encode()
    file = coded.indices.to_numpy(zero_copy_only=False)
    sizes = np.bincount(file, minlength=len(coded.dictionary))
    stated = np.zeros(len(sizes), np.int64)
    stated[file] = np.concatenate([parts for _, _, parts in looked])
    eligible = np.flatnonzero((sizes == stated) | whole)
    return _Files(
        sources=coded.dictionary.to_pylist(),
        eligible=eligible,
        sizes=sizes[eligible],
        unit=np.concatenate(
            [np.full(len(r), u) for (u, _, _), r in zip(looked, rows, strict=True)]
        ),
        row=np.concatenate(rows),
        file=file,
    )


def _chosen(found: _Files, count: int, seed: int) -> np.ndarray:
    """Numbers of files by lot: each that there is still room for, or one if there is for none."""
    keys = np.array([sample_key(found.sources[file]) for file in found.eligible])
    lots = uniform(seed, "held-out", 0, torch.from_numpy(keys), ()).numpy()
    order, chosen, room = np.lexsort((keys, lots)), [], count
    for place in order.tolist():
        if found.sizes[place] <= room:
            chosen.append(place)
            room -= int(found.sizes[place])
        if not room:
            break
    return found.eligible[chosen or order[:1]]


def _rows_of(found: _Files, chosen: np.ndarray) -> dict[int, np.ndarray]:
    """The rows of some files, by unit."""
    mine = np.isin(found.file, chosen)
    unit, row = found.unit[mine], found.row[mine]
    return {int(u): np.sort(row[unit == u]) for u in np.unique(unit)}


def _candidates(samples: SampleIndex, wanted: int, seed: int) -> np.ndarray:
    """Units that have enough samples between them, all of a small store's."""
    order = shuffled(len(samples.group), seed, "held-out")
    upto = np.cumsum(samples.count[order], dtype=np.int64)
    needed = int(np.searchsorted(upto, max(wanted, _LOOKED_AT))) + 1
    return np.asarray(order[:needed])


def _rows(samples: SampleIndex, unit: int) -> np.ndarray:
    """A unit's rows of its row group, int32."""
    every = np.arange(int(samples.groups.rows[samples.group[unit]]), dtype=np.int32)
    return every[samples.rows(unit)]


def _each(samples: SampleIndex, units: Iterable[int]) -> Iterator[tuple[int, pa.Array, np.ndarray]]:
    """Units with the files of their rows, and of how many rows each file says that it is."""
    files = TableFiles(samples.groups.uri)

    def read(unit: int) -> tuple[int, pa.Array, np.ndarray]:
        place = samples.groups.place(int(samples.group[unit]))
        where = Place(place.path, place.bytes, place.number)  # other columns than `place` says
        table = files.read(where, ("source_id", "parts")).take(pa.array(_rows(samples, unit)))
        ids = table["source_id"].combine_chunks().cast(pa.string())
        return unit, ids, table["parts"].to_numpy().astype(np.int64)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="held-out") as pool:
        yield from pool.map(read, units)


def _without(index: StoreIndex, held: dict[int, np.ndarray]) -> StoreIndex:
    """All rows but those held out, by unit."""
    samples = index.samples
    rest = {u: np.setdiff1d(_rows(samples, u), taken) for u, taken in held.items()}
    whole = set(range(len(samples.group))) - set(held)
    return replace(index, samples=_only(samples, whole, rest))


def _only(samples: SampleIndex, whole: Iterable[int], parts: dict[int, np.ndarray]) -> SampleIndex:
    """Some units as they are, and of others some rows."""
    kept = sorted([*whole, *(unit for unit, rows in parts.items() if len(rows))])
    rows = {k: parts.get(unit, samples.mixed.get(unit)) for k, unit in enumerate(kept)}
    mixed = {k: here for k, here in rows.items() if here is not None}
    count = samples.count[kept].copy()
    for k, here in mixed.items():
        count[k] = len(here)
    names = [name for k, name in enumerate(samples.buckets) if (samples.bucket[kept] == k).any()]
    number = {samples.buckets.index(name): k for k, name in enumerate(names)}
    digest = hashlib.sha256(samples.digest.encode())
    for unit in sorted(parts):
        digest.update(np.int64(unit).tobytes() + parts[unit].astype(np.int32).tobytes())
    return replace(
        samples,
        buckets=tuple(names),
        group=samples.group[kept],
        bucket=np.array([number[int(k)] for k in samples.bucket[kept]], np.int16),
        count=count,
        mixed=mixed,
        shapes={name: samples.shapes[name] for name in names},
        digest=digest.hexdigest()[:16],
    )
