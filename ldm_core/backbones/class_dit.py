"""The classic diffusion transformer: a class label, adaLN-zero and fixed positions (DiT-XL/2).

Peebles & Xie 2023, Sec. 3. Every block sees the time and the label only as shifts, scales and gates
of its branches. Those of all blocks are rows of one matrix, so they are one product per forward
pass. A video is more tokens, its frames told apart by fixed positions of their own.

Shapes: B batch, C channels, T x H x W latent size, p patch size, N = T HW/p^2 tokens, D width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from ldm_core.backbones.attention import attention
from ldm_core.backbones.embeddings import (
    Grid,
    check_channels,
    frame_waves,
    patchify,
    place_waves,
    timestep_waves,
    unpatchify,
)
from ldm_core.backbones.layers import MLP, VectorEmbedding, initialise_linears, modulate
from ldm_core.errors import UserError


class ClassDiTConfig(BaseModel):
    """The shape of a class-conditional DiT; the defaults are DiT-XL/2's.

    Attributes:
        in_channels: latent channels.
        latent_size: (H, W) whose tokens are one unit of position apart; others are stretched to it.
        patch_size: side of the square of latents that becomes one token.
        width: channels of a token, a multiple of 4 and of `heads`.
        classes: labels are 0 to classes - 1; `classes` itself is "no label".
        mlp_ratio: hidden width of the MLP over `width`.
        mlp_eps: of the norm before the MLP.
        timestep: (scale, offset) of the number it is told for a time, scale * t + offset.
        closed_waves: whether the slowest wave of the timestep is exactly 1 / 10000.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: PositiveInt = 4
    latent_size: tuple[PositiveInt, PositiveInt] = (32, 32)
    patch_size: PositiveInt = 2
    width: PositiveInt = 1152
    depth: PositiveInt = 28
    heads: PositiveInt = 16
    classes: PositiveInt = 1000
    mlp_ratio: float = 4.0
    mlp_eps: float = 1e-6
    timestep: tuple[float, float] = (1000.0, 0.0)
    closed_waves: bool = False

    def model_post_init(self, _: object) -> None:
        """Refuse widths that do not divide; pydantic reports it in a ValidationError."""
        if self.width % self.heads or self.width % 4:
            raise UserError(f"width {self.width} is not a multiple of 4 and of heads {self.heads}")


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-zero)."""

    def __init__(self, config: ClassDiTConfig) -> None:
        super().__init__()
        self.heads, self.mlp_eps = config.heads, config.mlp_eps
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mlp = MLP(config.width, int(config.mlp_ratio * config.width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`x` (B, N, D), `modulation` (B, 1, 6, D) -> `x`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(2)
        qkv = self.qkv(modulate(x, shift_a, scale_a))
        q, k, v = rearrange(qkv, "b n (part h k) -> part b h n k", part=3, h=self.heads)
        y = rearrange(attention(q, k, v), "b h n k -> b n (h k)")
        x = torch.addcmul(x, gate_a, self.out(y))
        return torch.addcmul(x, gate_m, self.mlp(modulate(x, shift_m, scale_m, self.mlp_eps)))


class ClassDiT(nn.Module):
    """(x_t, t, labels) -> the raw prediction, of the latent's shape; zero at initialisation."""

    takes_labels = True  # which nothing travels with, unlike captions

    def __init__(self, config: ClassDiTConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.in_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch, config.width)
        self.time_embedding = VectorEmbedding(256, config.width)
        self.label_embedding = nn.Embedding(config.classes + 1, config.width)
        self.modulation = nn.Linear(config.width, (6 * config.depth + 2) * config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = nn.Linear(config.width, patch)
        self.initialise()

    def initialise(self) -> None:
        """DiT's: Xavier-uniform, N(0, 0.02^2) for embeddings, zero for modulation and output."""
        initialise_linears(self, closed=[self.modulation, self.final])
        for embedding in (self.time_embedding.hidden, self.time_embedding.out):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.label_embedding.weight, std=0.02)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Predict at time `t`.

        Args:
            x_t: (B, C, H, W) noisy latents, or (B, C, T, H, W) of videos.
            t: (B,), noise at the process's end.
            labels: (B,) long, 0 to `classes`.

        Returns:
            What `x_t` is shaped like.

        Raises:
            UserError: H or W is not a multiple of the patch size, other channels, or a label out
                of range (not looked for once compiled).
        """
        self._check_labels(labels)
        check_channels(x_t, self.patch_embedding, self.config.patch_size)
        patches, grid = patchify(x_t, self.config.patch_size)
        x = self.patch_embedding(patches) + self._positions(grid, x_t.device).to(patches.dtype)
        condition = F.silu(self._condition(t, labels, patches.dtype))
        rows = self.modulation(condition).unflatten(1, (1, -1, self.config.width))
        *modulations, ends = rows.split([6] * self.config.depth + [2], dim=2)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation)
        patches = self.final(modulate(x, *ends.unbind(2)))
        return unpatchify(patches, grid, self.config.patch_size, x_t.ndim == 5)

    def _check_labels(self, labels: Tensor) -> None:
        """Before an embedding that tells no value, or on a GPU ends the process."""
        if torch.compiler.is_compiling():
            return
        outside = (labels < 0) | (labels > self.config.classes)
        if bool(outside.any()):
            raise UserError(
                f"label {int(labels[outside][0])} of {self.config.classes} classes: give 0 to "
                f"{self.config.classes - 1}, or {self.config.classes} for no label"
            )

    def _condition(self, t: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """What modulates every block, (B, D)."""
        scale, offset = self.config.timestep
        waves = timestep_waves(scale * t + offset, closed=self.config.closed_waves)
        return self.time_embedding(waves.to(dtype)) + self.label_embedding(labels)

    def _positions(self, grid: Grid, device: torch.device) -> Tensor:
        """(N, D) of a grid laid over the one of the config's latent size, frame by frame."""
        rows, columns = (
            torch.arange(size, device=device) * (latent // self.config.patch_size / size)
            for size, latent in zip(grid[1:], self.config.latent_size, strict=True)
        )
        places = place_waves(rows, columns, self.config.width)
        return (places + frame_waves(grid[0], self.config.width, device)[:, None]).flatten(0, 1)
