"""Blocks of an MMDiT: one attention over two kinds of tokens (Esser et al. 2024, Fig. 2b).

A modulation holds the shifts, scales and gates of a block's branches as rows, (B, 1, rows, D).

Shapes: B batch, N image tokens, L text tokens, M = L + N with the text first, D width, H heads,
K head width.
"""

import torch
from torch import Tensor, nn

from ldm_core.backbones.attention import attention
from ldm_core.backbones.context import ALONE, Context
from ldm_core.backbones.layers import MLP, modulate

Turn = tuple[Tensor, Tensor]
"""Cosines and sines of every token, (M, K) each: twice the cosines, and minus, then plus, the
sines, so that the pair (x_i, x_{i + K/2}) turns by x cos + swapped(x) sin."""


def unit_rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, at least float32 (Zhang & Sennrich 2019).

    From the norm of a vector, which reads x once and keeps nothing of its size.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return x * torch.rsqrt(norm.square() / x.shape[-1] + eps)


def turned(x: Tensor, turn: Turn | None) -> Tensor:
    """`x` (B, M, 2, H, K) of queries and keys, turned by its tokens' angles."""
    if turn is None:
        return x
    cosines, sines = (part[:, None, None].to(x.dtype) for part in turn)  # (M, 1, 1, K)
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


def heads_of(qkv: Tensor, heads: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, M, 3 D) -> queries and keys (B, M, 2, H, K), and values (B, M, H, K).

    With a `scale` (2, 1, K), queries and keys are normalised and multiplied by it.
    """
    qk, v = qkv.unflatten(-1, (3, heads, -1)).split([2, 1], dim=2)
    if scale is not None:
        qk = unit_rms(qk) * scale.expand(-1, heads, -1)
    return qk, v.squeeze(2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Context = ALONE, text: int = 0
) -> Tensor:
    """(B, M, H, K) each, `mask` added to the logits (B, 1, 1, M) -> (B, M, D).

    In a context, all workers hold the first `text` keys, and each its share of the others; the
    queries may lack those of the text. The mask is about all tokens.
    """
    read = text - (k.shape[1] - q.shape[1])  # queries of the text
    q, k, v = (
        context.to_heads(part.to(v.dtype), common).transpose(1, 2)
        for part, common in ((q, read), (k, text), (v, text))
    )
    y = attention(q, k, v, mask)
    return context.to_tokens(y.transpose(1, 2), read).flatten(2)


class Stream(nn.Module):
    """What one kind of token has to itself in a joint block."""

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.scale = nn.Parameter(torch.ones(2, 1, width // heads)) if qk_norm else None
        self.out = nn.Linear(width, width)
        self.mlp = MLP(width, hidden)

    def start(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """`x` (B, N, D), `modulation` (B, 1, 2, D) -> `heads_of`."""
        shift, scale = modulation.unbind(2)
        return heads_of(self.qkv(modulate(x, shift, scale)), self.heads, self.scale)

    def finish(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """Close both branches: `x`, `attended` (B, N, D), `modulation` (B, 1, 4, D) -> `x`."""
        gate_a, shift_m, scale_m, gate_m = modulation.unbind(2)
        x = torch.addcmul(x, gate_a, self.out(attended))
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m)))


class JointBlock(nn.Module):
    """Image and text attend to both and each passes an MLP of its own."""

    joint = True  # passes (image, text) on
    context: Context = ALONE  # the workers that the image tokens are dealt out to

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.image = Stream(width, heads, hidden, qk_norm)
        self.text = Stream(width, heads, hidden, qk_norm)

    def forward(
        self, image: Tensor, text: Tensor, modulation: Tensor, turn: Turn | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`image` (B, N, D), `text` (B, L, D), `modulation` of 6 + 6 rows, `turn` of the image."""
        enter_i, leave_i, enter_t, leave_t = modulation.split([2, 4, 2, 4], dim=2)
        qk_i, v_i = self.image.start(image, enter_i)
        qk_t, v_t = self.text.start(text, enter_t)
        q, k = torch.cat([qk_t, turned(qk_i, turn)], dim=1).unbind(2)
        v = torch.cat([v_t, v_i], dim=1)
        y = attend(q, k, v, mask, self.context, text.shape[1])
        y_t, y_i = y.split([text.shape[1], image.shape[1]], dim=1)
        return self.image.finish(image, y_i, leave_i), self.text.finish(text, y_t, leave_t)


class LastJointBlock(nn.Module):
    """A joint block after which nobody reads the text: it has keys and values only."""

    joint = True  # passes (image, text) on
    context: Context = ALONE  # the workers that the image tokens are dealt out to

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.image = Stream(width, heads, hidden, qk_norm)
        self.text_kv = nn.Linear(width, 2 * width)
        self.text_scale = nn.Parameter(torch.ones(width // heads)) if qk_norm else None

    def forward(
        self, image: Tensor, text: Tensor, modulation: Tensor, turn: Turn | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`image` (B, N, D), `text` (B, L, D), `modulation` of 6 + 2 rows, `turn` of the image."""
        enter_i, leave_i, enter_t = modulation.split([2, 4, 2], dim=2)
        qk, v_i = self.image.start(image, enter_i)
        q, k_i = turned(qk, turn).unbind(2)
        kv = self.text_kv(modulate(text, *enter_t.unbind(2)))
        k_t, v_t = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)
        if self.text_scale is not None:
            k_t = unit_rms(k_t) * self.text_scale
        k, v = torch.cat([k_t, k_i], dim=1), torch.cat([v_t, v_i], dim=1)
        y = attend(q, k, v, mask, self.context, text.shape[1])
        return self.image.finish(image, y, leave_i), text


class SingleBlock(nn.Module):
    """All tokens alike, attention and MLP side by side on the same input, one gate for both."""

    context: Context = ALONE  # the workers that the image tokens are dealt out to

    def __init__(self, width: int, heads: int, hidden: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.scale = nn.Parameter(torch.ones(2, 1, width // heads)) if qk_norm else None
        self.out = nn.Linear(width, width, bias=False)  # the MLP's output has one for both
        self.mlp = MLP(width, hidden)

    def forward(
        self, x: Tensor, modulation: Tensor, turn: Turn | None, mask: Tensor, text: int = 0
    ) -> Tensor:
        """`x` (B, M, D), `modulation` of 3 rows, `turn` of all tokens, `text` of them -> `x`."""
        shift, scale, gate = modulation.unbind(2)
        y = modulate(x, shift, scale)
        qk, v = heads_of(self.qkv(y), self.heads, self.scale)
        q, k = turned(qk, turn).unbind(2)
        attended = attend(q, k, v, mask, self.context, text)
        return torch.addcmul(x, gate, self.out(attended) + self.mlp(y))
