"""A batch of captions as the backbones see it: token embeddings, their mask and a pooled vector.

Further conditions travel along by name. A backbone does not look at them: networks that are wrapped
around it (`channels`, `numbers`, `control`) read the ones they know and pass the whole on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_core.conditioning.extra import Extra


@dataclass(frozen=True)
class TextCondition:
    """Embedded captions; a batch that can be indexed, concatenated, padded and moved.

    Attributes:
        tokens: (B, L, D) per-token embeddings, zero where padded.
        mask: (B, L) bool, True where there is a token.
        pooled: (B, P) one vector per caption.
        extras: B further conditions each, by name; without a name, that condition is absent.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    extras: Mapping[str, Extra] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice | Tensor) -> TextCondition:
        """Select captions; an int keeps the batch dimension, so the result is always a batch."""
        if isinstance(index, int):
            index = range(len(self))[index]  # checks the bounds and resolves a negative index
            index = slice(index, index + 1)
        extras = {name: extra[index] for name, extra in self.extras.items()}
        return TextCondition(self.tokens[index], self.mask[index], self.pooled[index], extras)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TextCondition:
        """Move, and cast the embeddings; the mask stays bool, and further conditions as exact."""
        return TextCondition(
            self.tokens.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.pooled.to(device=device, dtype=dtype),
            {name: extra.to(device) for name, extra in self.extras.items()},
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
            {name: extra.expand(batch) for name, extra in self.extras.items()},
        )

    def pad_to(self, length: int) -> TextCondition:
        """Append masked zero tokens up to `length`, which is at least the present length."""
        missing = length - self.tokens.shape[1]
        assert missing >= 0, f"cannot pad {self.tokens.shape[1]} tokens to {length}"
        if missing == 0:
            return self
        tokens, mask = F.pad(self.tokens, (0, 0, 0, missing)), F.pad(self.mask, (0, missing))
        return replace(self, tokens=tokens, mask=mask)

    def with_extra(self, name: str, value: Tensor, strength: float | Tensor = 1.0) -> TextCondition:
        """Add a condition, (B, ...) for B captions, or put it in the place of its namesake.

        Raises:
            ValueError: not as many conditions as captions.
        """
        if len(value) != len(self):
            raise ValueError(f"{len(value)} conditions {name!r} for {len(self)} captions")
        extra = Extra(value, torch.ones(len(value), device=value.device)).scaled(strength)
        return replace(self, extras={**self.extras, name: extra})

    def scaled(self, name: str, strength: float | Tensor) -> TextCondition:
        """Weaken one condition by a number, or by one per sample (B,); 0 takes it away.

        Raises:
            ValueError: there is no such condition.
        """
        if name not in self.extras:
            raise ValueError(f"no condition {name!r}, only {sorted(self.extras)}")
        return replace(self, extras={**self.extras, name: self.extras[name].scaled(strength)})

    @staticmethod
    def cat(conditions: Sequence[TextCondition]) -> TextCondition:
        """One batch of all the captions, in order, padded to the longest.

        A condition that only some of them have is absent from the others: guidance by a null
        caption without it is guidance towards it, too.
        """
        longest = max(condition.tokens.shape[1] for condition in conditions)
        padded = [condition.pad_to(longest) for condition in conditions]
        return TextCondition(
            torch.cat([condition.tokens for condition in padded]),
            torch.cat([condition.mask for condition in padded]),
            torch.cat([condition.pooled for condition in padded]),
            _cat_extras(conditions),
        )


def drop_captions(cond: TextCondition, null: TextCondition, drop: Tensor) -> TextCondition:
    """Replace the captions where `drop` (B,) is true by the empty one; `extras` stay."""
    if not bool(drop.any()):
        return cond
    empty = null.pad_to(cond.tokens.shape[1]).expand(len(cond))
    column = drop[:, None]
    return replace(
        cond,
        tokens=torch.where(column[..., None], empty.tokens, cond.tokens),
        mask=torch.where(column, empty.mask, cond.mask),
        pooled=torch.where(column, empty.pooled, cond.pooled),
    )


def drop_extras(
    cond: TextCondition, uniforms: Mapping[str, Tensor], probabilities: Mapping[str, float]
) -> TextCondition:
    """Take each named condition away from the samples whose own uniform (B,) is below its
    probability.

    Raises:
        ValueError: there is no condition of that name.
    """
    for name, probability in probabilities.items():
        cond = cond.scaled(name, (uniforms[name] >= probability).float())
    return cond


def _cat_extras(conditions: Sequence[TextCondition]) -> dict[str, Extra]:
    """By name, filled with absence where a batch lacks it."""
    first = {name: extra for cond in reversed(conditions) for name, extra in cond.extras.items()}
    return {
        name: Extra.cat([cond.extras.get(name, model.absent(len(cond))) for cond in conditions])
        for name, model in first.items()
    }
