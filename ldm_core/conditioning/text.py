"""A batch of captions as the backbones see it: token embeddings, their mask and a pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Embedded captions; a batch that can be indexed, concatenated, padded and moved.

    Attributes:
        tokens: (B, L, D) per-token embeddings, zero where padded.
        mask: (B, L) bool, True where there is a token.
        pooled: (B, P) one vector per caption.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice | Tensor) -> TextCondition:
        """Select captions; an int keeps the batch dimension, so the result is always a batch."""
        if isinstance(index, int):
            index = range(len(self))[index]  # checks the bounds and resolves a negative index
            index = slice(index, index + 1)
        return TextCondition(self.tokens[index], self.mask[index], self.pooled[index])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextCondition:
        """Move, and cast the embeddings; the mask stays bool."""
        return TextCondition(
            self.tokens.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.pooled.to(device=device, dtype=dtype),
        )

    def expand(self, batch: int) -> TextCondition:
        """Repeat a batch of one `batch` times without copying; a batch of `batch` stays as it is.

        Raises:
            RuntimeError: torch's, when the size is neither 1 nor `batch`.
        """
        return TextCondition(
            self.tokens.expand(batch, -1, -1),
            self.mask.expand(batch, -1),
            self.pooled.expand(batch, -1),
        )

    def pad_to(self, length: int) -> TextCondition:
        """Append masked zero tokens up to `length`, which is at least the present length."""
        missing = length - self.tokens.shape[1]
        assert missing >= 0, f"cannot pad {self.tokens.shape[1]} tokens to {length}"
        if missing == 0:
            return self
        return TextCondition(
            F.pad(self.tokens, (0, 0, 0, missing)), F.pad(self.mask, (0, missing)), self.pooled
        )

    @staticmethod
    def cat(conditions: Sequence[TextCondition]) -> TextCondition:
        """One batch of all the captions, in order, padded to the longest."""
        longest = max(condition.tokens.shape[1] for condition in conditions)
        padded = [condition.pad_to(longest) for condition in conditions]
        return TextCondition(
            torch.cat([condition.tokens for condition in padded]),
            torch.cat([condition.mask for condition in padded]),
            torch.cat([condition.pooled for condition in padded]),
        )


def drop_captions(cond: TextCondition, null: TextCondition, drop: Tensor) -> TextCondition:
    """Replace the captions where `drop` (B,) is true by the empty one."""
    if not bool(drop.any()):
        return cond
    empty = null.pad_to(cond.tokens.shape[1]).expand(len(cond))
    column = drop[:, None]
    return TextCondition(
        torch.where(column[..., None], empty.tokens, cond.tokens),
        torch.where(column, empty.mask, cond.mask),
        torch.where(column, empty.pooled, cond.pooled),
    )
