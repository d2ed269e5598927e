"""Rows of `samples` as numbers: posteriors in 16 bits, the ids' keys, the captions drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ldm_core.errors import UserError
from ldm_core.latents.reader import sample_key
from ldm_core.latents.schema import SAMPLES
from ldm_core.random import uniform
from ldm_core.reading.cells import arrays
from ldm_core.reading.row_groups import as_schema
from ldm_core.reading.text_index import hash_of

_LATENTS = ("latent_mean", "latent_logvar")


@dataclass(frozen=True)
class SampleRows:
    """Some rows of a row group, whose arrays still lie as they were read.

    Attributes:
        means, logvars: (n, *shape) float16, of all the row group's rows.
        rows: (k,) which of them are meant.
        keys: (k,) int64, of their ids.
        captions: (k,) lists of captions.
    """

    means: np.ndarray
    logvars: np.ndarray
    rows: np.ndarray
    keys: torch.Tensor
    captions: pa.ListArray


def decode_samples(table: pa.Table, rows: np.ndarray, shape: tuple[int, ...]) -> SampleRows:
    """Rows (k,) of a row group with the columns of `sample_index.COLUMNS`.

    Raises:
        UserError: a latent of another shape, or a sample without captions.
    """
    table = as_schema(table, SAMPLES)
    small = table.select(["id", "captions"]).take(pa.array(rows))
    ids = small["id"].to_pylist()
    try:
        means, logvars = (_latents(table[name], rows, shape) for name in _LATENTS)
    except ValueError as error:
        raise UserError(
            f"the latents of {ids[0]!r} or its neighbours are not of shape {shape}: {error}. "
            "`ldm store verify` says which rows, `ldm encode` makes them anew"
        ) from error
    captions = small["captions"].combine_chunks()
    _refuse_uncaptioned(ids, captions)
    keys = torch.tensor([sample_key(id) for id in ids], dtype=torch.int64)
    return SampleRows(means, logvars, rows, keys, captions)


def drawn_captions(samples: SampleRows, seed: int, turn: int) -> np.ndarray:
    """Hashes (k,) uint64 of the captions drawn for a pass: a function of seed, pass and sample."""
    lengths = samples.captions.value_lengths().to_numpy().astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    entries = samples.captions.flatten()
    weights = pc.struct_field(entries, "weight").to_numpy(zero_copy_only=False)
    u = uniform(seed, "caption", turn, samples.keys, ()).numpy()
    chosen = starts + _pick(weights.astype(np.float64), starts, lengths, u)
    digests = pc.struct_field(entries, "digest").take(pa.array(chosen))
    return hash_of(digests)


def _latents(column: pa.ChunkedArray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """All rows' arrays, (n, *shape); zeros for those but `rows` if not all are of that shape."""
    try:
        return arrays(column, shape)
    except ValueError:
        wanted = arrays(column.take(pa.array(rows)), shape)  # those of another bucket may differ
        result = np.zeros((len(column), *shape), np.float16)
        result[rows] = wanted
        return result


def _refuse_uncaptioned(ids: Sequence[str], captions: pa.ListArray) -> None:
    lengths = pc.fill_null(captions.value_lengths(), 0).to_numpy()
    lacking = np.flatnonzero(lengths == 0)
    if len(lacking):
        raise UserError(
            f"{ids[lacking[0]]!r} and {len(lacking) - 1} others have no caption: run `ldm encode` "
            "again, which gives the empty one"
        )


def _pick(
    weights: np.ndarray, starts: np.ndarray, lengths: np.ndarray, u: np.ndarray
) -> np.ndarray:
    """Of each sample the first caption whose cumulated weight exceeds u in (0, 1)."""
    width = int(lengths.max())
    place = np.arange(width)
    there = place < lengths[:, None]
    padded = np.where(there, weights[np.where(there, starts[:, None] + place, 0)], 0.0)
    upto = np.cumsum(padded, axis=1)
    upto /= upto[:, -1:]  # exactly 1 from the last caption on
    return (upto <= u[:, None]).sum(1)
