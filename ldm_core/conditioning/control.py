"""A control branch: a trainable copy of a network's first blocks reads a hint, and what it makes is
added to the blocks' outputs (ControlNet, Zhang et al. 2023, Sec. 3.1; on transformers, Chen et al.
2024, "PixArt-delta", Sec. 4).

What enters the copy and what leaves it passes layers that start at zero, so at first the network
is as it was. With trunk blocks f_i, copies g_i, and the hint's tokens h:

    c_0 = x_0 + h,    c_{i+1} = g_i(c_i),    x_{i+1} = f_i(x_i) + strength * W_i c_{i+1}

Shapes: B batch, N image tokens, D width, p pixels of the hint per token and axis.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ldm_core.conditioning.extra import Extra, check_takes_captions
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError


class Controlled(nn.Module):
    """A network with a control branch; several of them nest, over the same blocks.

    The blocks take image tokens (B, N, D) first and return them. They are reached by forward hooks
    that exist during a call only, so the network itself is unchanged; one call at a time.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        name: str,
        width: int,
        channels: int,
        patch: int,
    ) -> None:
        """Wrap a network.

        Args:
            network: not frozen here; `requires_grad_(False)` does.
            blocks: its first blocks, e.g. `dit.blocks[:4]`.
            name: of the condition, whose value is a hint (B, channels, H, W).
            width: D.
            channels: of the hint.
            patch: p; pixels per latent times patch size for a hint of the picture's size.

        Raises:
            UserError: the network takes labels, or a block passes text and image on together.
        """
        super().__init__()
        check_takes_captions(network, type(self).__name__)
        _check_blocks(blocks)
        self.network, self.name = network, name
        self.trunk = tuple(blocks)  # a tuple, so that they are registered once only, in `network`
        self.hint = nn.Conv2d(channels, width, patch, patch).to(next(network.parameters()))
        self.blocks = nn.ModuleList(deepcopy(block).requires_grad_(True) for block in blocks)
        self.out = nn.ModuleList(nn.Linear(width, width).to(self.hint.weight) for _ in blocks)
        for layer in (self.hint, *self.out):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, cond: TextCondition, *times: Tensor) -> Tensor:
        """As the network, under control if `cond` has the hint.

        Raises:
            ValueError: the hint's channels or size do not fit.
        """
        hint = cond.extras.get(self.name)
        if hint is None:
            return self.network(x_t, t, cond, *times)
        stream = _Stream(self, hint)
        with ExitStack() as hooks:
            for index, block in enumerate(self.trunk):
                add = partial(stream.add, index)
                hooks.callback(block.register_forward_hook(add, with_kwargs=True).remove)
            return self.network(x_t, t, cond, *times)

    def tokens(self, hint: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        if hint.shape[1] != self.hint.in_channels:
            raise ValueError(
                f"hint {self.name!r} has {hint.shape[1]} channels, "
                f"the branch takes {self.hint.in_channels}"
            )
        return rearrange(self.hint(hint.to(self.hint.weight)), "b d h w -> b (h w) d")


def _check_blocks(blocks: Sequence[nn.Module]) -> None:
    for index, block in enumerate(blocks):
        if getattr(block, "joint", False):
            raise UserError(
                f"block {index} is a {type(block).__name__}, which passes image and text on "
                "together; a control branch adds to image tokens alone: control a DiT"
            )


class _Stream:
    """The copies' tokens during one call."""

    def __init__(self, branch: Controlled, hint: Extra) -> None:
        self.branch, self.hint, self.tokens = branch, hint, branch.tokens(hint.value)

    def add(
        self,
        index: int,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Tensor,
    ) -> Tensor:
        """The hook of block `index`: its output and that of its copy."""
        if not args:
            raise UserError(
                f"{type(self.branch.trunk[index]).__name__} is given its tokens by name; a control "
                "branch follows blocks that take image tokens first, as DiT's do"
            )
        x, *others = args
        if index == 0:
            self._check(x)
            self.tokens = x + self.tokens
        self.tokens = self.branch.blocks[index](self.tokens, *others, **kwargs)
        return out + self.hint.weigh(self.branch.out[index](self.tokens))

    def _check(self, x: Tensor) -> None:
        if x.shape[:2] != self.tokens.shape[:2]:
            raise ValueError(
                f"hint {self.branch.name!r} of shape {tuple(self.hint.value.shape)} makes "
                f"{self.tokens.shape[1]} tokens for {len(self.tokens)} samples, the network has "
                f"{x.shape[1]} for {len(x)}: a token is {self.branch.hint.stride[0]} pixels wide"
            )
