"""Conditions of the latent's own grid, given as further input channels (Rombach et al. 2022,
Sec. 3.3): masks, known regions, low-resolution latents, first frames.

A trained network takes them once its first layer is widened with columns of zeros, which leave its
output as it was:

    dit.patch_embedding = widen_linear(dit.patch_embedding, (C + 1) * patch_size**2)
    network = ChannelConditioned(dit, {"inpainting": C + 1})

Shapes: B batch, C channels, ... the latent's grid.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm_core.conditioning.extra import check_takes_captions
from ldm_core.conditioning.text import TextCondition


class Widened(nn.Module):
    """trained(x[:n]) + added(x[n:]): n features are those the trained layer knows.

    The trained layer stays whole, so that its output is the same to the last bit, not only up to
    the order of a longer sum.
    """

    def __init__(
        self, trained: nn.Module, added: nn.Module, split: tuple[int, int], dim: int
    ) -> None:
        super().__init__()
        self.trained, self.added, self.split, self.dim = trained, added, split, dim
        for parameter in added.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with known + added features along `dim`.

        Raises:
            ValueError: another number of features.
        """
        if x.shape[self.dim] != sum(self.split):
            raise ValueError(
                f"the input has {x.shape[self.dim]} features, the widened layer takes "
                f"{self.split[0]} + {self.split[1]}: give every condition it was widened for"
            )
        known, further = x.split(self.split, dim=self.dim)
        return self.trained(known) + self.added(further)


def widen_linear(trained: nn.Linear, features: int) -> Widened:
    """A linear layer that takes `features` more behind those it knows, ignoring them at first.

    For a patch embedding, C' * p^2 of them; its patches have to be channel by channel, (c p q).
    """
    added = nn.Linear(features, trained.out_features, bias=False).to(trained.weight)
    return Widened(trained, added, (trained.in_features, features), dim=-1)


def widen_convolution(trained: nn.Conv2d | nn.Conv3d, channels: int) -> Widened:
    """A convolution that takes `channels` more behind those it knows, ignoring them at first."""
    kind: Any = type(trained)
    added = kind(
        channels, trained.out_channels, trained.kernel_size, trained.stride, trained.padding,
        trained.dilation, bias=False, padding_mode=trained.padding_mode,
    ).to(trained.weight)  # fmt: skip
    return Widened(trained, added, (trained.in_channels, channels), dim=1)


class ChannelConditioned(nn.Module):
    """A widened network whose further channels are conditions; absent ones are zeros."""

    def __init__(self, network: nn.Module, channels: Mapping[str, int]) -> None:
        """`channels` of each condition, in the order in which they are concatenated.

        Raises:
            UserError: the network takes labels, see `check_takes_captions`.
        """
        super().__init__()
        check_takes_captions(network, type(self).__name__)
        self.network, self.channels = network, dict(channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: TextCondition, *times: Tensor) -> Tensor:
        """As the network, with strength times each condition behind the channels of `x_t`.

        Raises:
            ValueError: a condition of another shape than (B, its channels, ...).
        """
        further = [self._channels(name, x_t, cond) for name in self.channels]
        return self.network(torch.cat([x_t, *further], dim=1), t, cond, *times)

    def _channels(self, name: str, x_t: Tensor, cond: TextCondition) -> Tensor:
        shape = (len(x_t), self.channels[name], *x_t.shape[2:])
        extra = cond.extras.get(name)
        if extra is None:
            return x_t.new_zeros(shape)
        if extra.value.shape != shape:
            raise ValueError(
                f"condition {name!r} is {tuple(extra.value.shape)}, a latent of "
                f"{tuple(x_t.shape)} needs {shape}"
            )
        return extra.weigh(extra.value.to(x_t))
