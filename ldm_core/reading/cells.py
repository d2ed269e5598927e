"""Columns of binary cells as numpy sees them: no row is touched by Python."""

import numpy as np
import pyarrow as pa


def cells(column: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The cells' bytes end to end, uint8, and where each begins and the last ends, (n + 1,) int64.

    Args:
        column: of strings or binary cells with 32-bit offsets; null is an empty cell.
    """
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks != 1:
            return _joined([cells(chunk) for chunk in column.chunks])
        column = column.chunk(0)
    if not len(column):
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, offsets, data = column.buffers()
    first = column.offset
    ends = np.frombuffer(offsets, np.int32)[first : first + len(column) + 1].astype(np.int64)
    whole = np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8)
    return whole[ends[0] : ends[-1]], ends - ends[0]


def arrays(column: pa.Array | pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """Cells of float16 arrays of one shape, as (n, *shape); not copied if they lie in one piece.

    Raises:
        ValueError: a cell of another size.
    """
    data, ends = cells(column)
    size = 2 * int(np.prod(shape))
    wrong = np.flatnonzero(np.diff(ends) != size)
    if len(wrong):
        found = int(np.diff(ends)[wrong[0]])
        raise ValueError(f"row {wrong[0]} has {found} bytes, {size} are a float16 array of {shape}")
    return data.view("<f2").reshape(-1, *shape)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    sizes = [np.diff(ends) for _, ends in parts]
    data = np.concatenate([np.zeros(0, np.uint8), *(data for data, _ in parts)])
    return data, np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]))
