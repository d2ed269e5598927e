"""A condition beside the caption: a tensor, and how strongly it is meant.

A network that knows the condition adds an effect of it somewhere: channels, a vector, residuals of
a branch. Wherever that is, the rule is one:

    effect(strength) = null + strength (effect - null),    null = 0

so 1 is the condition as given, 0 is its absence, between them lies an interpolation, and dropping a
condition in training is a strength of 0. A caption has `drop_captions` for its null and the
guidance scale for its strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_core.diffusion.process import over_dimensions
from ldm_core.errors import UserError


@dataclass(frozen=True)
class Extra:
    """One tensor per sample and its strength; a batch as a `TextCondition` is.

    Attributes:
        value: (B, ...) what the networks that know it read; they cast it to their dtype.
        strength: (B,) 1 as given, 0 absent.
    """

    value: Tensor
    strength: Tensor

    def __post_init__(self) -> None:
        """Refuse a strength that is not one number per sample."""
        if self.strength.shape != self.value.shape[:1]:
            raise ValueError(
                f"strength {tuple(self.strength.shape)} for {len(self.value)} conditions of shape "
                f"{tuple(self.value.shape)}: give one number per sample"
            )

    def __getitem__(self, index: slice | Tensor) -> Extra:
        """Select samples."""
        return Extra(self.value[index], self.strength[index])

    def to(self, device: torch.device | str | None) -> Extra:
        """Move."""
        return Extra(self.value.to(device=device), self.strength.to(device=device))

    def expand(self, batch: int) -> Extra:
        """Repeat a batch of one without copying; a batch of `batch` stays as it is."""
        value = self.value.expand(batch, *self.value.shape[1:])
        return Extra(value, self.strength.expand(batch))

    def scaled(self, strength: float | Tensor) -> Extra:
        """Times a number, or one per sample (B,)."""
        return Extra(self.value, self.strength * strength)

    def weigh(self, effect: Tensor) -> Tensor:
        """Strength times effect, (B, ...) -> (B, ...)."""
        return over_dimensions(self.strength.to(effect), effect) * effect

    def absent(self, batch: int) -> Extra:
        """`batch` samples without this condition."""
        value = self.value.new_zeros(batch, *self.value.shape[1:])
        return Extra(value, self.strength.new_zeros(batch))

    @staticmethod
    def cat(extras: Sequence[Extra]) -> Extra:
        """One batch of all, in order."""
        return Extra(
            torch.cat([extra.value for extra in extras]),
            torch.cat([extra.strength for extra in extras]),
        )


def check_takes_captions(network: nn.Module, wrapper: str) -> None:
    """Refuse to wrap a network whose condition is bare labels, which no extra travels with.

    Raises:
        UserError: the network, or one inside it, takes labels.
    """
    for module in network.modules():
        if getattr(module, "takes_labels", False):
            raise UserError(
                f"{wrapper} reads a condition that travels with captions, but a "
                f"{type(module).__name__} takes labels alone: use a network of captions, whose "
                "class is a caption of one token (ClassEmbedding)"
            )
