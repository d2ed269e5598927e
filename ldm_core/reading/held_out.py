"""Some samples set aside, which are never trained on: chosen by their ids, so that they stay.

As long as a store has no more than `_LOOKED_AT` samples, its next version holds out the same ones
but for what came and went; of a larger one only some row groups are looked at.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from ldm_core.errors import UserError
from ldm_core.latents.reader import sample_key
from ldm_core.random import uniform
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.row_groups import Place, TableFiles
from ldm_core.reading.sample_index import SampleIndex
from ldm_core.reading.shuffles import shuffled

_LOOKED_AT = 2**16  # samples whose ids are read, at least


def hold_out(index: StoreIndex, count: int, seed: int) -> tuple[StoreIndex, StoreIndex]:
    """An index of all samples but `count`, and one of these.

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
    rows = {unit: _rows(samples, unit) for unit in _candidates(samples, 8 * count, seed)}
    unit = np.concatenate([np.full(len(here), unit) for unit, here in rows.items()])
    keys = [key for unit, here in rows.items() for key in _keys(samples, unit, here)]
    lots = uniform(seed, "held-out", 0, torch.tensor(keys), ()).numpy()
    chosen = np.lexsort((np.array(keys), lots))[:count]
    place = np.concatenate(list(rows.values()))
    held = {int(u): np.sort(place[chosen[unit[chosen] == u]]) for u in np.unique(unit[chosen])}
    rest = {u: np.setdiff1d(_rows(samples, u), taken) for u, taken in held.items()}
    whole = set(range(len(samples.group))) - set(held)
    return (
        replace(index, samples=_only(samples, whole, rest)),
        replace(index, samples=_only(samples, (), held)),
    )


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


def _keys(samples: SampleIndex, unit: int, rows: np.ndarray) -> list[int]:
    place = samples.groups.place(int(samples.group[unit]))
    where = Place(place.path, place.bytes, place.number)  # other columns than `place` says
    ids = TableFiles(samples.groups.uri).read(where, ("id",))["id"].to_pylist()
    return [sample_key(ids[row]) for row in rows]


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
