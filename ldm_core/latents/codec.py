"""Text embeddings in 8 bits: whole numbers and a 16-bit scale for every few channels.

Transformers have a few channels that are many times larger than the rest (Dettmers et al. 2022,
"LLM.int8()", https://arxiv.org/abs/2208.07339, section 4), and one scale for a whole row would
drown the others in rounding. A scale for each block of channels, as the same author stores
optimiser states (https://arxiv.org/abs/2110.02861, section 2), confines an outlier's damage to its
block.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm_core.errors import UserError
from ldm_core.latents.schema import ARRAY_DTYPE, decode_array, encode_array

# The largest power of two that keeps rows with 50-fold outliers within 1 %; 32 gives 1.3 %.
BLOCK = 16
INT8_DTYPE = f"int8-b{BLOCK}"

_AT_ONCE = 64  # cells decoded in one go: small ones are sooner joined than decoded
_LEVELS = 127  # symmetric: -128 stays unused
_LARGEST = 65504.0  # of float16
_LARGEST_SCALE = 515.5  # the largest float16 of which 127 are still a float16

_Function = TypeVar("_Function", bound=Callable[..., object])


def encode_int8(values: Tensor) -> tuple[bytes, float]:
    """Rows as 8-bit numbers, each block of `BLOCK` channels in steps of its largest / 127.

    Layout, row after row: ceil(D / BLOCK) scales, little-endian float16, then D signed bytes; a
    value is its byte times its block's scale. Rows stand alone, so cells laid end to end are the
    rows laid end to end.

    A value is off by half a step at most, so the relative error is at most about sqrt(BLOCK) / 254,
    1.6 %, whatever the values. Rounding errors spread evenly over a step make it sqrt(BLOCK) / (127
    sqrt(12)), 0.9 %, where each block is one outlier and little else, and less otherwise.

    Args:
        values: (L, D) embeddings.

    Returns:
        The bytes, and the relative error ||x - x^|| / ||x|| of what `decode_int8` makes of them.

    Raises:
        BadMedia: as `encode_array` does, for what 16 bits cannot hold either.
    """
    rows = values.detach().to("cpu", torch.float32)
    blocks = _in_blocks(rows)
    peaks = blocks.abs().amax(-1)
    if not bool((peaks <= _LARGEST).all()):  # NaN included
        encode_array(values)  # refuses them
    scales = _scales(peaks.numpy())
    steps = torch.from_numpy(np.where(scales > 0, scales, 1).astype(np.float32))
    levels = (blocks / steps[..., None]).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
    levels = levels.reshape(len(rows), -1)[:, : rows.shape[1]]
    data = np.concatenate([scales.view(np.int8), levels.numpy()], axis=1).tobytes()
    return data, _relative_error(rows, decode_int8(data, rows.shape))


def decode_int8(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """What `encode_int8` made, as a float16 array of `shape`, (L, D); L may be -1."""
    width = shape[-1]
    edge = 2 * _blocks(width)  # bytes of a row's scales
    rows = np.frombuffer(data, np.int8).reshape(-1, edge + width)
    scales = rows[:, :edge].copy().view("<f2").astype(np.float32)
    levels = torch.from_numpy(rows[:, edge:].copy())
    values = _in_blocks(levels) * torch.from_numpy(scales)[..., None]
    # in torch, because numpy rounds to 16 bits twenty times slower
    return values.reshape(len(rows), -1)[:, :width].half().numpy().reshape(tuple(shape))


_ENCODERS: dict[str, Callable[[Tensor], bytes]] = {
    ARRAY_DTYPE: encode_array,
    INT8_DTYPE: lambda values: encode_int8(values)[0],
}
# Of each, the bytes of cells end to end are to be those of their rows end to end.
_DECODERS = {ARRAY_DTYPE: decode_array, INT8_DTYPE: decode_int8}


def encode_embedding(values: Tensor, dtype: str) -> bytes:
    """An embedding (L, D) as its row's `dtype` column says.

    Raises:
        UserError: a dtype this program does not know.
        BadMedia: as `encode_array` does.
    """
    return _known(_ENCODERS, dtype)(values)


def measured_embedding(values: Tensor, dtype: str) -> tuple[bytes, float | None]:
    """As `encode_embedding`, with the relative error that 8 bits make; None of 16.

    Raises:
        UserError, BadMedia: as `encode_embedding` does.
    """
    return encode_int8(values) if dtype == INT8_DTYPE else (encode_embedding(values, dtype), None)


def decode_embedding(data: bytes, shape: Sequence[int], dtype: str) -> np.ndarray:
    """A stored embedding as a float16 array of `shape`, by the `dtype` column of its row.

    Raises:
        UserError: a dtype this program does not know.
    """
    return _known(_DECODERS, dtype)(data, shape)


def decode_column(
    cells: pa.ChunkedArray, dtypes: pa.ChunkedArray, lengths: np.ndarray, width: int
) -> Tensor:
    """Embeddings end to end, (sum of lengths, width) float16, whatever each is stored as.

    Args:
        cells: binary, each of shape (length, width).
        dtypes: of each cell.
        lengths: (N,) whole numbers, rows of each cell.
        width: channels.

    Raises:
        UserError: as `decode_embedding` does.
    """
    rows = np.empty((int(lengths.sum()), width), np.float16)  # the one copy beside the table
    names, ends = dtypes.to_pylist(), np.cumsum(lengths)
    runs = groupby(range(len(names)), key=lambda place: (names[place], place // _AT_ONCE))
    for (dtype, _), run in runs:
        places = list(run)
        data = b"".join(cells[place].as_buffer() for place in places)
        start, end = ends[places[0]] - lengths[places[0]], ends[places[-1]]
        rows[start:end] = decode_embedding(data, (end - start, width), dtype)
    return torch.from_numpy(rows)


def _known(functions: dict[str, _Function], dtype: str) -> _Function:
    if dtype not in functions:
        raise UserError(
            f"embeddings of dtype {dtype!r}, this program has {', '.join(functions)}: use one of "
            "them, or the program that wrote the store"
        )
    return functions[dtype]


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _in_blocks(rows: Tensor) -> Tensor:
    """(L, D) -> (L, ceil(D / BLOCK), BLOCK), the last block filled up with zeros."""
    length, width = rows.shape
    return pad(rows, (0, -width % BLOCK)).reshape(length, _blocks(width), BLOCK)


def _scales(peaks: np.ndarray) -> np.ndarray:
    """Steps of which 127 reach the peaks, as little-endian float16.

    Rounded up, so that a block of values near the end of 16 bits' range does not become zeros.
    """
    exact = peaks / _LEVELS
    near = exact.astype(np.float16)
    up = np.nextafter(near, np.float16(np.inf))
    scales = np.where(near < exact, up, near)
    return np.minimum(scales, np.float16(_LARGEST_SCALE)).astype("<f2")


def _relative_error(exact: Tensor, decoded: np.ndarray) -> float:
    # in 64 bits the squares of the smallest numbers do not vanish
    size = torch.linalg.vector_norm(exact, dtype=torch.float64)
    error = torch.linalg.vector_norm(exact - torch.from_numpy(decoded), dtype=torch.float64)
    return float(error / size) if size else 0.0
