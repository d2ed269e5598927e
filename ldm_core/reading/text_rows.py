"""Embeddings of captions: row groups of `texts` decoded, and those a window needs picked out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition
from ldm_core.latents.codec import decode_column, decode_embedding
from ldm_core.latents.schema import TEXTS
from ldm_core.reading.cells import cells
from ldm_core.reading.row_groups import as_schema

TOKENS, POOLED = "t5", "clip"  # the encoders of which they are read

T = TypeVar("T")


@dataclass(frozen=True)
class TextGroup:
    """A row group of `texts`: of each encoder what is read of it.

    Attributes:
        captions: (n,) strings.
        tokens: (sum of L, D) float16, end to end.
        lengths: (n,) int64, L of each row; 0 where none are read.
        pooled: (m, P) float16, of the rows of which one is read.
        place: (n,) int64, where a row's is among them.
    """

    captions: pa.Array
    tokens: np.ndarray
    lengths: np.ndarray
    pooled: np.ndarray
    place: np.ndarray

    @property
    def bytes(self) -> int:
        """In memory."""
        arrays = (self.tokens, self.lengths, self.pooled, self.place)
        return int(self.captions.nbytes + sum(array.nbytes for array in arrays))


def decode_texts(table: pa.Table) -> TextGroup:
    """A row group with the columns of `text_index.COLUMNS`, whatever its embeddings' dtypes."""
    table = as_schema(table, TEXTS)
    with_tokens = _there(table, "tokens", TOKENS)
    shapes = table["tokens_shape"].filter(pa.array(with_tokens)).combine_chunks()
    shapes = shapes.flatten().to_numpy().reshape(-1, 2)
    lengths = np.zeros(len(table), np.int64)
    lengths[with_tokens] = shapes[:, 0]
    with_pooled = _there(table, "pooled", POOLED)
    once = np.ones(int(with_pooled.sum()), np.int64)
    widths = table["pooled_size"].filter(pa.array(with_pooled)).to_numpy()
    return TextGroup(
        captions=table["caption"].combine_chunks(),
        tokens=_embeddings(table, "tokens", with_tokens, shapes[:, 0], shapes[:, 1]),
        lengths=lengths,
        pooled=_embeddings(table, "pooled", with_pooled, once, widths),
        place=np.cumsum(with_pooled) - with_pooled,
    )


@dataclass(frozen=True)
class Texts:
    """Embeddings of T captions, token by token end to end: no padding is held.

    Attributes:
        captions: (T,) strings.
        tokens: (sum of L, D) float16.
        starts, lengths: (T,) int64, of each caption's tokens.
        pooled: (T, P) float16.
    """

    captions: pa.Array
    tokens: Tensor
    starts: Tensor
    lengths: Tensor
    pooled: Tensor

    @property
    def bytes(self) -> int:
        """In memory."""
        tensors = (self.tokens, self.starts, self.lengths, self.pooled)
        return int(self.captions.nbytes + sum(each.nbytes for each in tensors))

    def condition(self, which: Tensor) -> TextCondition:
        """Embeddings of captions (B,), padded with zeros to the longest of them."""
        lengths = self.lengths[which]
        place = torch.arange(int(lengths.max()))[None]  # (1, L)
        mask = place < lengths[:, None]
        rows = torch.where(mask, self.starts[which][:, None] + place, 0)
        tokens = self.tokens.index_select(0, rows.view(-1)).view(*rows.shape, -1)  # whole rows
        tokens = tokens.float().mul_(mask[..., None])
        return TextCondition(tokens, mask, self.pooled[which].float())

    def names(self, which: Tensor) -> list[str]:
        """The captions themselves."""
        return list(self.captions.take(pa.array(which.numpy())).to_pylist())


Places = tuple[np.ndarray, np.ndarray]  # row groups and rows, (T,) each
Load = Callable[[Sequence[int]], Iterator[TextGroup]]


def pick_texts(load: Load, tokens: Places, pooled: Places) -> Texts:
    """The embeddings of T captions.

    Args:
        load: gives row groups one after the other.
        tokens, pooled: where those of each caption are.
    """
    captions, rows, lengths = zip(*_from_groups(load, tokens, _tokens_of), strict=True)
    back = np.argsort(_order(tokens))
    sizes = np.concatenate(lengths)
    starts = np.cumsum(sizes) - sizes
    vectors = np.concatenate(_from_groups(load, pooled, _pooled_of))
    return Texts(
        captions=pa.concat_arrays(captions).take(pa.array(back)),
        tokens=torch.from_numpy(np.concatenate(rows)),
        starts=torch.from_numpy(starts[back]),
        lengths=torch.from_numpy(sizes[back]),
        pooled=torch.from_numpy(vectors[np.argsort(_order(pooled))]),
    )


def join_texts(parts: Sequence[Texts]) -> Texts:
    """The captions of several stores, one after the other."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(len(part.tokens) for part in parts)])
    return Texts(
        captions=pa.concat_arrays([part.captions for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        starts=torch.cat([part.starts + int(n) for part, n in zip(parts, before, strict=False)]),
        lengths=torch.cat([part.lengths for part in parts]),
        pooled=torch.cat([part.pooled for part in parts]),
    )


def _order(places: Places) -> np.ndarray:
    """Row group by row group, row by row."""
    group, row = places
    return np.lexsort((row, group))


def _from_groups(load: Load, places: Places, take: Callable[[TextGroup, np.ndarray], T]) -> list[T]:
    """What `take` gives of the rows of each row group, in the order of `_order`."""
    order = _order(places)
    groups, rows = places[0][order], places[1][order]
    cuts = np.flatnonzero(np.diff(groups)) + 1
    wanted = groups[np.concatenate([[0], cuts])].tolist()
    parts = np.split(rows, cuts)
    return [take(group, part) for group, part in zip(load(wanted), parts, strict=True)]


def _pooled_of(group: TextGroup, rows: np.ndarray) -> np.ndarray:
    return group.pooled[group.place[rows]]


def _tokens_of(group: TextGroup, rows: np.ndarray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    lengths = group.lengths[rows]
    starts = (np.cumsum(group.lengths) - group.lengths)[rows]
    places = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    places += np.arange(len(places))
    return group.captions.take(pa.array(rows)), group.tokens[places], lengths


def _there(table: pa.Table, name: str, encoder: str) -> np.ndarray:
    """Which rows have one by the encoder of which it is read."""
    return pc.and_(pc.is_valid(table[name]), pc.equal(table["encoder"], encoder)).to_numpy()


def _embeddings(
    table: pa.Table, name: str, there: np.ndarray, lengths: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """(sum of lengths, width) float16 of the rows of which `name` is read."""
    if not len(widths):
        return np.zeros((0, 0), np.float16)
    width = int(widths[0])
    assert (widths == width).all(), f"{name} of several widths in one row group"
    dtypes = table["dtype"].filter(pa.array(there))
    names = pc.unique(dtypes).to_pylist()
    if len(names) > 1:
        column = table[name].filter(pa.array(there))
        return decode_column(column, dtypes, lengths.astype(np.int64), width).numpy()
    others = len(table) - table[name].null_count > len(widths)  # which are not read
    column = table[name].filter(pa.array(there)) if others else table[name]
    data, _ = cells(column)  # end to end they are as one, and a null cell is empty
    buffer = cast(bytes, data)  # as numpy reads it
    return decode_embedding(buffer, (int(lengths.sum()), width), names[0])
