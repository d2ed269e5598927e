"""Activation checkpointing: forget a block's activations, compute them again in the backward pass.

Chen et al. 2016. Either function changes a block in place and leaves its names alone; loss and
gradients stay the same bit for bit, as the blocks draw nothing at random.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Callable[[nn.Module], None]


def recompute_all(block: nn.Module) -> None:
    """Keep the block's input only: a third more computation."""
    block.forward = _Recomputed(block.forward)


def recompute_cheap(block: nn.Module) -> None:
    """Keep what matrix products, attention and exchanges between workers gave, too.

    What remains to be computed again is pointwise, a few per cent of the time, and it is most of
    what a block would keep.
    """
    block.forward = _Recomputed(block.forward, context_fn=_keeping_dear)


class _Recomputed:
    """A forward method that forgets; an object, so that a copied block runs its own."""

    def __init__(self, forward: Callable[..., Any], **options: Any) -> None:
        self.forward, self.options = forward, options

    def __call__(self, *args: Any, **named: Any) -> Any:
        return checkpoint(
            self.forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            **self.options,
            **named,
        )


_DEAR = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}


def _keeping_dear() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    dear = operation in _DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
