"""A text-conditioned latent diffusion transformer: captions and patches in one stream of blocks.

DiT's adaptive layer norm (Peebles & Xie 2023, Sec. 3.2), joint caption tokens as in MMDiT
(Esser et al. 2024, Sec. 4) but with shared weights, RMSNorm, QK-norm, SwiGLU and axial RoPE.

Shapes: B batch, C channels, H x W latent size, p patch size, N = HW/p^2 image tokens, L caption
tokens, D width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from ldm_core.backbones.layers import (
    Attention,
    RMSNorm,
    RotaryTable,
    SwiGLU,
    TimeEmbedding,
    axial_rotary,
    prepend_unrotated,
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
    flow_map: bool = False

    def model_post_init(self, _: object) -> None:
        """Refuse sizes that do not divide; pydantic reports the UserError in a ValidationError."""
        if self.width % (4 * self.heads):
            raise UserError(
                f"width {self.width} is not a multiple of 4 x heads ({self.heads}): "
                f"try width {4 * self.heads * math.ceil(self.width / (4 * self.heads))}"
            )
        image_tokens(self, self.latent_size)

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU."""
        return 8 * math.ceil(self.mlp_ratio * self.width / 8)


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-zero)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, scale=False)
        self.attention = Attention(config.width, config.heads)
        self.mlp_norm = RMSNorm(config.width, scale=False)
        self.mlp = SwiGLU(config.width, config.hidden)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(
        self, x: Tensor, condition: Tensor, table: RotaryTable, mask: Tensor | None
    ) -> Tensor:
        """`x` (B, N, D), `condition` (B, 1, D) already through SiLU -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, -1)
        y = self.attention_norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.attention(y, table, mask)
        y = self.mlp_norm(x) * (1 + scale_m) + shift_m
        return x + gate_m * self.mlp(y)


class DiT(nn.Module):
    """(x_t, t, caption) -> the raw prediction, of the latent's shape; zero at initialisation."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.in_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch, config.width)
        self.text_norm = RMSNorm(config.text_width)
        self.text_embedding = nn.Linear(config.text_width, config.width)
        self.pooled_norm = RMSNorm(config.pooled_width)
        self.pooled_embedding = nn.Linear(config.pooled_width, config.width)
        self.time_embedding = TimeEmbedding(config.width)
        self.interval_embedding = TimeEmbedding(config.width) if config.flow_map else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = RMSNorm(config.width, scale=False)
        self.final_modulation = nn.Linear(config.width, 2 * config.width)
        self.final = nn.Linear(config.width, patch)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform matrices and zero biases; zero for what opens each residual branch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        closed = [block.modulation for block in self.modules() if isinstance(block, Block)]
        closed += [self.final_modulation, self.final]
        if self.interval_embedding is not None:
            closed.append(self.interval_embedding.out)
        for linear in closed:
            nn.init.zeros_(linear.weight)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: TextCondition, r: Tensor | None = None
    ) -> Tensor:
        """Predict at time `t`, or over [r, t] when the config says `flow_map`.

        Args:
            x_t: (B, C, H, W) noisy latents.
            t: (B,) in [0, 1], noise at 1.
            cond: B captions; padded tokens change nothing.
            r: (B,) in [0, t]; None means r = t, the instantaneous velocity.

        Returns:
            (B, C, H, W).

        Raises:
            UserError: H or W is not a multiple of the patch size.
        """
        p, length = self.config.patch_size, cond.tokens.shape[1]
        image_tokens(self.config, x_t.shape[-2:])
        h, w = x_t.shape[-2] // p, x_t.shape[-1] // p
        image = rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x = torch.cat(
            [self.text_embedding(self.text_norm(cond.tokens)), self.patch_embedding(image)], dim=1
        )  # (B, L + N, D)
        condition = F.silu(self._condition(t, r, cond))[:, None]  # (B, 1, D)
        head_width = self.config.width // self.config.heads
        table = prepend_unrotated(axial_rotary(h, w, head_width, x.device), length)
        mask = _attention_mask(cond.mask, h * w, x.dtype)
        for block in self.blocks:
            x = block(x, condition, table, mask)
        shift, scale = self.final_modulation(condition).chunk(2, dim=-1)
        image = self.final(self.final_norm(x[:, length:]) * (1 + scale) + shift)
        return rearrange(image, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)

    def _condition(self, t: Tensor, r: Tensor | None, cond: TextCondition) -> Tensor:
        """What modulates every block: times and pooled caption, (B, D)."""
        pooled = self.pooled_embedding(self.pooled_norm(cond.pooled))
        condition = self.time_embedding(t, cond.pooled.dtype) + pooled
        if self.interval_embedding is None:
            assert r is None, "only a network with flow_map=True takes a second time"
            return condition
        interval = torch.zeros_like(t) if r is None else t - r
        return condition + self.interval_embedding(interval, cond.pooled.dtype)


def image_tokens(config: DiTConfig, latent_size: tuple[int, int] | torch.Size) -> int:
    """N, how many tokens a latent of (H, W) becomes.

    Raises:
        UserError: H or W is not a multiple of the patch size.
    """
    height, width = latent_size
    if height % config.patch_size or width % config.patch_size:
        raise UserError(
            f"a latent of {height} x {width} does not divide into patches of "
            f"{config.patch_size} x {config.patch_size}: crop it or choose another patch_size"
        )
    return (height // config.patch_size) * (width // config.patch_size)


def forward_flops(
    config: DiTConfig, text_tokens: int, latent_size: tuple[int, int] | None = None
) -> int:
    """FLOPs of one sample's forward pass; a multiply-add counts 2, pointwise work nothing.

    `latent_size` defaults to the config's. A training step is three times this.
    """
    n = image_tokens(config, latent_size or config.latent_size)
    d, total = config.width, n + text_tokens
    per_token = 4 * d * d + 3 * d * config.hidden  # qkv and out; SwiGLU
    attention = 2 * total * total * d  # logits and weighted values
    block = total * per_token + attention + 6 * d * d
    patch = config.in_channels * config.patch_size**2
    times = (1 + config.flow_map) * (2 * TimeEmbedding.pairs * d + d * d)
    ends = 2 * n * patch * d + text_tokens * config.text_width * d + config.pooled_width * d
    return 2 * (config.depth * block + ends + times + 2 * d * d)


def _attention_mask(text_mask: Tensor, image_count: int, dtype: torch.dtype) -> Tensor:
    """0 for keys that may be attended to and -inf for padding: (B, 1, 1, L + N)."""
    visible = F.pad(text_mask, (0, image_count), value=True)
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, -math.inf)[:, None, None]
