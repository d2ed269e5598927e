"""Softmax attention, by the fastest of torch's kernels for the heads at hand."""

import torch
import torch.nn.functional as F
from torch import Tensor

FULL = 32  # channels that torch's 16-bit CPU kernel takes at once


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v.

    On CPUs, in bfloat16 and with heads of other sizes than multiples of 32, gradients come some
    times faster in float32, and are more exact.

    Args:
        q: (B, H, N, K).
        k, v: (B, H, M, K).
        mask: of numbers, added to the logits, broadcast to (B, H, N, M).

    Returns:
        (B, H, N, K), in the dtype of `q`, or of autocast where that casts it.
    """
    assert mask is None or mask.is_floating_point()
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-1] % FULL == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):  # which would cast them back
        added = None if mask is None else mask.float()
        y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=added)
    return y.to(q.dtype)
