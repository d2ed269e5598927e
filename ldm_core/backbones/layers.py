"""The parts transformers are put together from: rotary positions, attention, SwiGLU.

Shapes: B batch, N tokens, D width, H heads, K = D / H head width, F hidden width of the MLP.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm_core.backbones.attention import attention
from ldm_core.backbones.context import ALONE, Context
from ldm_core.backbones.embeddings import Grid, RotaryTable, geometric_waves, grid_rotary


def axial_rotary(height: int, width: int, head_width: int, device: torch.device) -> RotaryTable:
    """Rotary angles of a height x width grid: half of the pairs turn with the row, half with the
    column, counted from the middle. Rows are the slow axis: (N = height * width).
    """
    return grid_rotary((height, width), (head_width // 4, head_width // 4), device)


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn the pair (x_i, x_{i + K/2}) of every head by its token's angle: (..., N, K)."""
    cosines, sines = (part.to(x.dtype) for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


class Attention(nn.Module):
    """Multi-head attention, by default with normalised queries and keys (Henry et al. 2020).

    The norm is a layer norm with a scale and no shift, which torch has as one kernel on any device.
    Without `qk_norm` there is neither norm nor scale.

    Attributes:
        context: the workers that the tokens of `x` are dealt out to, if any.
    """

    context: Context = ALONE

    def __init__(self, width: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.LayerNorm(width // heads, elementwise_affine=False)
        # of queries, then of keys; one-dimensional, so neither decayed nor orthogonalised
        self.scale = nn.Parameter(torch.ones(2 * (width // heads))) if qk_norm else None
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        table: RotaryTable | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Attend from `x` to `x`, and to `memory` if there is one.

        Args:
            x: (B, N, D); in a context, this worker's share of the tokens.
            mask: added to the logits, broadcast to (B, H, N, N), or (B, H, N, L + N); in a context
                about all tokens, and alike for all heads.
            table: turns the queries and keys of `x`, N rows.
            memory: (B, L, D) tokens that are only read; they have no position. In a context, all
                workers hold all of them.

        Returns:
            (B, N, D).
        """
        scale = None if self.scale is None else self.scale.view(2, 1, 1, 1, -1)
        qk, (v,) = self._heads(self.qkv(x)).split([2, 1])
        if scale is not None:
            qk = self.norm(qk) * scale  # both at once: (2, B, H, N, K)
        qk = (qk if table is None else rotate(qk, table)).to(v.dtype)
        if self.context.size > 1:  # a share of the tokens -> a share of the heads
            qk, v = self.context.swap(torch.cat([qk, v[None]]), split=2, join=3).split([2, 1])
            v = v[0]
        q, k = qk
        if memory is not None:
            weight = self.qkv.weight[x.shape[-1] :]  # without the queries' rows
            memory_k, memory_v = self._heads(F.linear(memory, weight))
            if scale is not None:
                memory_k = (self.norm(memory_k) * scale[1]).to(v.dtype)
            memory_k, memory_v = (self.context.share(x, 1) for x in (memory_k, memory_v))
            k = torch.cat([memory_k, k], dim=2)  # (B, H, L + N, K)
            v = torch.cat([memory_v, v], dim=2)
        y = attention(q, k, v, mask)
        y = self.context.swap(y, split=2, join=1)  # back: (B, H, N, K)
        return self.out(rearrange(y, "b h n k -> b n (h k)"))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, parts * D) -> (parts, B, H, N, K)."""
        width = self.out.in_features // self.heads
        return rearrange(x, "b n (part h k) -> part b h n k", h=self.heads, k=width)


class GridConvolution(nn.Module):
    """x + a depthwise 3 x 3 convolution of every frame's grid of tokens, nothing at initialisation.

    The conditional position encoding of Chu et al. 2021 (Sec. 3.3): every token learns from its
    neighbours where in a contour it lies, the same way all over the picture.

    Attributes:
        context: the workers that the tokens are dealt out to, if any.
    """

    context: Context = ALONE

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        # in the layout that tokens have as a picture, so that the gradient has the weight's
        closed = torch.zeros_like(self.kernel.weight).to(memory_format=torch.channels_last)
        self.kernel.weight = nn.Parameter(closed)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, N = frames * rows * columns, D) -> (B, N, D).

        In a context, `x` is this worker's share of the tokens of `grid`. If these are no whole
        frames, it gets all tokens and a share of the channels meanwhile, each convolved by itself.
        """
        workers, (t, h, w) = self.context, grid
        if t % workers.size == 0:
            return x + self._convolved(x, self.kernel.weight, (t // workers.size, h, w))
        channels = workers.swap(x, split=2, join=1)
        channels = self._convolved(channels, workers.share(self.kernel.weight, 0), grid)
        return x + workers.swap(channels, split=1, join=2)

    def _convolved(self, x: Tensor, kernel: Tensor, grid: Grid) -> Tensor:
        t, h, w = grid
        pictures = rearrange(x, "b (t h w) d -> (b t) d h w", t=t, h=h, w=w)
        pictures = F.conv2d(pictures, kernel, padding=1, groups=len(kernel))
        return rearrange(pictures, "(b t) d h w -> b (t h w) d", t=t)


class SwiGLU(nn.Module):
    """W_3 (SiLU(W_1 x) * W_2 x) (Shazeer 2020, Eq. 6), W_1 and W_2 as one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_value = nn.Linear(width, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class TimeEmbedding(nn.Module):
    """A number in [0, 1] -> (B, D): sines and cosines, then a two-layer MLP.

    The frequencies run geometrically from 1/2 to 64 radians per unit of time: fine enough to tell
    steps of 1/1000 apart, slow enough for d/dt to stay moderate, as flow maps need (Lu & Song
    2024, Sec. 4.1). Differentiable in t; computed in the dtype of t, returned in `dtype`.
    """

    lowest, highest, pairs = 0.5, 64.0, 64

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * self.pairs, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D)."""
        waves = geometric_waves(t, self.lowest, self.highest, self.pairs)
        return self.out(F.silu(self.hidden(waves.to(dtype))))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm of (B, N, D), scaled by 1 + `scale` and shifted, (B, 1, D) each."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def visible_keys(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, (B, 1, 1, K): 0 for visible keys (B, K), else very negative.

    Not -inf, so that a caption without a single token gives numbers, which nobody then looks at.
    """
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min / 2)[:, None, None]


class MLP(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.out(F.gelu(self.hidden(x), approximate="tanh"))


class VectorEmbedding(nn.Module):
    """Two layers with a SiLU between them, from one vector per sample to the width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels) -> (B, D)."""
        return self.out(F.silu(self.hidden(x)))


def initialise_linears(network: nn.Module, closed: Iterable[nn.Linear]) -> None:
    """Xavier-uniform matrices and zero biases; zero for the `closed`, which open a branch later."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for linear in closed:
        nn.init.zeros_(linear.weight)
