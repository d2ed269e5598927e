"""A text-conditioned latent diffusion transformer: patches that read a refined caption.

DiT's adaptive layer norm (Peebles & Xie 2023, Sec. 3.2), QK-norm, SwiGLU and axial RoPE.
Captions first pass a few blocks of their own, as in Lumina-Image 2.0 (Qin et al. 2025); every image
block then has them as further keys and values in its one attention. They do not depend on x_t or t.
A depthwise convolution before every image block lets a token see its neighbours' contours, the
same way wherever they lie. A video is more tokens: frames, rows and columns turn queries and keys.

Shapes: B batch, C channels, T x H x W latent size, p patch size, N = T HW/p^2 image tokens, L
caption tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ldm_core.backbones.context import ALONE, Context
from ldm_core.backbones.embeddings import (
    Grid,
    RotaryTable,
    check_channels,
    grid_rotary,
    patch_grid,
    patchify,
    unpatchify,
)
from ldm_core.backbones.layers import (
    Attention,
    GridConvolution,
    SwiGLU,
    TimeEmbedding,
    axial_rotary,
    initialise_linears,
    visible_keys,
)
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError


class DiTConfig(BaseModel):
    """The shape of a DiT.

    Attributes:
        in_channels: latent channels.
        latent_size: (H, W) it is meant for; any multiple of `patch_size` works.
        patch_size: side of the square of latents that becomes one token.
        width: channels of a token, a multiple of 4 * `heads`.
        mlp_ratio: hidden width of the SwiGLU over `width`, rounded up to a multiple of 8.
        text_width: channels of a caption token.
        pooled_width: channels of the pooled caption vector.
        text_depth: blocks that refine the caption.
        qk_norm: whether queries and keys are normalised, of picture and caption.
        frame_pairs: pairs of a head's channels that turn with the frame, an even number; 0 is a
            network of pictures.
        flow_map: whether it takes a second time r and predicts the average velocity over [r, t].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: PositiveInt
    latent_size: tuple[PositiveInt, PositiveInt]
    patch_size: PositiveInt
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: float = 8 / 3
    text_width: PositiveInt
    pooled_width: PositiveInt
    text_depth: NonNegativeInt = 2
    qk_norm: bool = True
    frame_pairs: NonNegativeInt = 0
    flow_map: bool = False

    def model_post_init(self, _: object) -> None:
        """Refuse sizes that do not divide; pydantic reports the UserError in a ValidationError."""
        if self.width % (4 * self.heads):
            raise UserError(
                f"width {self.width} is not a multiple of 4 x heads ({self.heads}): "
                f"try width {4 * self.heads * math.ceil(self.width / (4 * self.heads))}"
            )
        pairs = self.width // self.heads // 2
        if self.frame_pairs % 2 or self.frame_pairs > pairs - 2:
            raise UserError(
                f"frame_pairs {self.frame_pairs} of a head's {pairs}: choose an even number up to "
                f"{pairs - 2}, rows and columns share the rest"
            )
        image_tokens(self, self.latent_size)

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU."""
        return 8 * math.ceil(self.mlp_ratio * self.width / 8)


class Block(nn.Module):
    """A look at the neighbours, then attention and MLP, each scaled, shifted and gated by the
    condition (adaLN-zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.neighbours = GridConvolution(config.width)
        self.attention_norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.attention = Attention(config.width, config.heads, config.qk_norm)
        self.mlp_norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.mlp = SwiGLU(config.width, config.hidden)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        condition: Tensor,
        table: RotaryTable,
        text: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """`x` (B, N, D), `condition` (B, 1, D) already through SiLU, `text` (B, L, D) -> `x`."""
        x = self.neighbours(x, grid)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, -1)
        y = self.attention_norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.attention(y, mask, table, text)
        y = self.mlp_norm(x) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(y)


class TextBlock(nn.Module):
    """Attention and MLP over a caption's tokens, which carry their order in their embeddings."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.attention = Attention(config.width, config.heads, config.qk_norm)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp = SwiGLU(config.width, config.hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class DiT(nn.Module):
    """(x_t, t, caption) -> the raw prediction, of the latent's shape; zero at initialisation.

    Attributes:
        context: the workers that the image tokens are dealt out to, if any.
    """

    context: Context = ALONE

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.in_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch, config.width)
        self.position_embedding = nn.Linear(config.width, config.width, bias=False)
        self.text_norm = nn.LayerNorm(config.text_width, bias=False)
        self.text_embedding = nn.Linear(config.text_width, config.width)
        self.text_blocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_depth))
        self.memory_norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.pooled_norm = nn.LayerNorm(config.pooled_width, bias=False)
        self.pooled_embedding = nn.Linear(config.pooled_width, config.width)
        self.time_embedding = TimeEmbedding(config.width)
        self.interval_embedding = TimeEmbedding(config.width) if config.flow_map else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.final_modulation = nn.Linear(config.width, 2 * config.width)
        self.final = nn.Linear(config.width, patch)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform matrices and zero biases; zero for what opens each residual branch."""
        closed = [self.final_modulation, self.final]
        for block in self.modules():
            if isinstance(block, Block):
                closed.append(block.modulation)
            if isinstance(block, TextBlock):
                closed += [block.attention.out, block.mlp.out]
        if self.interval_embedding is not None:
            closed.append(self.interval_embedding.out)
        initialise_linears(self, closed)

    def spread_tokens(self, context: Context) -> None:
        """Deal the image tokens out to workers that are given the same inputs from now on.

        Every one of them returns the whole prediction; see `Context` about its gradients.

        Raises:
            UserError: the heads do not divide.
        """
        context.check_heads(self.config.heads)
        self.context = context
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attention.context = block.neighbours.context = context

    def forward(
        self, x_t: Tensor, t: Tensor, cond: TextCondition, r: Tensor | None = None
    ) -> Tensor:
        """Predict at time `t`, or over [r, t] when the config says `flow_map`.

        Args:
            x_t: (B, C, H, W) noisy latents, or (B, C, T, H, W) of videos.
            t: (B,) in [0, 1], noise at 1.
            cond: B captions; padded tokens change nothing.
            r: (B,) in [0, t]; None means r = t, the instantaneous velocity.

        Returns:
            What `x_t` is shaped like.

        Raises:
            UserError: H or W is not a multiple of the patch size, other channels, a video for a
                network of pictures, or a second time for one without `flow_map`.
        """
        p = self.config.patch_size
        check_channels(x_t, self.patch_embedding, p)
        text = self._refine(cond)  # (B, L, D)
        patches, grid = patchify(x_t, p)  # (B, N, C p^2); (T, h, w)
        mask = visible_keys(F.pad(cond.mask, (0, patches.shape[1]), value=True), x_t.dtype)
        share = self.context.share  # from here on N is this worker's, but for the mask
        cosines, sines = self._rotary(grid, x_t.device)
        table = share(cosines, 0), share(sines, 0)
        x = self.patch_embedding(share(patches, 1)) + share(self._places(grid, patches), 0)
        condition = F.silu(self._condition(t, r, cond))[:, None]  # (B, 1, D)
        for block in self.blocks:
            x = block(x, grid, condition, table, text, mask)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        patches = self.final(self.final_norm(x) * (1 + scale) + shift)
        return unpatchify(self.context.whole(patches, 1), grid, p, x_t.ndim == 5)

    def _rotary(self, grid: Grid, device: torch.device) -> RotaryTable:
        """What turns queries and keys, N rows."""
        in_time = self.config.frame_pairs
        if grid[0] > 1 and not in_time:
            raise UserError(f"a video of {grid[0]} frames for a network with frame_pairs 0")
        in_place = (self.config.width // self.config.heads // 2 - in_time) // 2
        return grid_rotary(grid, (in_time, in_place, in_place), device)

    def _places(self, grid: Grid, like: Tensor) -> Tensor:
        """Where a patch lies in its frame, (N, D)."""
        frames, h, w = grid
        waves = torch.cat(axial_rotary(h, w, self.config.width, like.device), dim=-1)  # (h w, D)
        return self.position_embedding(waves.to(like.dtype)).repeat(frames, 1)

    def _refine(self, cond: TextCondition) -> Tensor:
        """What the image blocks read, (B, L, D)."""
        text = self.text_embedding(self.text_norm(cond.tokens))
        mask = visible_keys(cond.mask, cond.tokens.dtype)
        for block in self.text_blocks:
            text = block(text, mask)
        return self.memory_norm(text)

    def _condition(self, t: Tensor, r: Tensor | None, cond: TextCondition) -> Tensor:
        """What modulates every block: times and pooled caption, (B, D)."""
        pooled = self.pooled_embedding(self.pooled_norm(cond.pooled))
        condition = self.time_embedding(t, cond.pooled.dtype) + pooled
        if self.interval_embedding is None:
            if r is not None:
                raise UserError("only a network with flow_map=True takes a second time r")
            return condition
        interval = torch.zeros_like(t) if r is None else t - r
        return condition + self.interval_embedding(interval, cond.pooled.dtype)


def image_tokens(config: DiTConfig, latent_size: tuple[int, int]) -> int:
    """How many tokens a latent of (H, W) becomes, of one frame.

    Raises:
        UserError: H or W is not a multiple of the patch size.
    """
    return math.prod(patch_grid(latent_size, config.patch_size))


def forward_flops(
    config: DiTConfig,
    text_tokens: int,
    latent_size: tuple[int, int] | None = None,
    frames: int = 1,
) -> int:
    """FLOPs of one sample's forward pass; a multiply-add counts 2, pointwise work nothing.

    `latent_size` defaults to the config's. A training step is three times this.
    """
    in_frame = image_tokens(config, latent_size or config.latent_size)
    n = frames * in_frame
    d, length = config.width, text_tokens
    per_token = 4 * d * d + 3 * d * config.hidden  # qkv and out; SwiGLU
    block = n * (per_token + 9 * d) + length * 2 * d * d + 2 * n * (length + n) * d + 6 * d * d
    text_block = length * per_token + 2 * length * length * d
    patch = config.in_channels * config.patch_size**2
    times = (1 + config.flow_map) * (2 * TimeEmbedding.pairs * d + d * d)
    captions = (length * config.text_width + config.pooled_width) * d
    ends = (2 * n * patch + in_frame * d) * d + captions
    blocks = config.depth * block + config.text_depth * text_block
    return 2 * (blocks + ends + times + 2 * d * d)
