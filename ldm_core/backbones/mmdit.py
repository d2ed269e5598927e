"""MMDiT: image and text tokens, each with weights of their own, in one attention.

Esser et al. 2024, Fig. 2: a joint block gives either kind its own projections, norms and MLP, and
only the attention is shared. Single blocks may follow, as in Flux, which treat both kinds alike
and run attention and MLP side by side (Dehghani et al. 2023, Eq. 1). Time and pooled caption shift,
scale and gate every branch; these rows are one matrix, one product per forward pass. Videos are
more tokens: frames, rows and columns turn queries and keys by rotary angles.

Shapes: B batch, C channels, T x H x W latent size, p patch size, N = T HW/p^2 image tokens, L text
tokens, M = L + N with the text first, D width, K head width.
"""

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from ldm_core.backbones.context import ALONE, Context
from ldm_core.backbones.embeddings import (
    Grid,
    check_channels,
    grid_rotary,
    patchify,
    place_waves,
    timestep_waves,
    unpatchify,
)
from ldm_core.backbones.joint_attention import JointBlock, LastJointBlock, SingleBlock, Turn
from ldm_core.backbones.layers import VectorEmbedding, initialise_linears, modulate, visible_keys
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError


class MMDiTConfig(BaseModel):
    """The shape of an MMDiT.

    Attributes:
        in_channels: latent channels.
        patch_size: side of the square of latents that becomes one token; a frame is one token deep.
        width: channels of a token, a multiple of 4 and of `heads`.
        depth: joint blocks; the last one only reads the text, unless single blocks follow.
        single_depth: blocks over all tokens alike.
        mlp_ratio: hidden width of the MLPs over `width`.
        text_width: channels of a caption token.
        pooled_width: channels of the pooled caption vector.
        qk_norm: whether queries and keys are normalised (Esser et al. 2024, Sec. 5.3.2).
        rotary: channels of a head that turn with frame, row and column, together the head width;
            None adds fixed positions instead, for images only.
        rotary_base: of the angles' frequencies.
        position_grid: side of the square of fixed positions, whose middle a picture takes.
        position_span: the number that its last row ends before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    single_depth: NonNegativeInt = 0
    mlp_ratio: float = 4.0
    text_width: PositiveInt
    pooled_width: PositiveInt
    qk_norm: bool = True
    rotary: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = None
    rotary_base: float = 10_000.0
    position_grid: PositiveInt = 192
    position_span: PositiveInt = 64

    def model_post_init(self, _: object) -> None:
        """Refuse widths that do not divide; pydantic reports it in a ValidationError."""
        if self.width % self.heads or self.width % 4:
            raise UserError(f"width {self.width} is not a multiple of 4 and of heads {self.heads}")
        head = self.width // self.heads
        if self.rotary and (sum(self.rotary) != head or any(n % 2 for n in self.rotary)):
            raise UserError(
                f"rotary {self.rotary} is to be even numbers that add up to the head width {head}"
            )

    @property
    def modulations(self) -> list[int]:
        """Rows of D that modulate each part, in order: joint blocks, single blocks, the end."""
        last = 6 if self.single_depth else 2  # a text that is only read has neither gate nor MLP
        return [12] * (self.depth - 1) + [6 + last] + [3] * self.single_depth + [2]


class MMDiT(nn.Module):
    """(x_t, t, caption) -> the raw prediction, of the latent's shape; zero at initialisation.

    Attributes:
        context: the workers that the image tokens are dealt out to, if any.
    """

    context: Context = ALONE

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.in_channels * config.patch_size**2
        shape = (width, config.heads, int(config.mlp_ratio * width), config.qk_norm)
        self.patch_embedding = nn.Linear(patch, width)
        self.text_embedding = nn.Linear(config.text_width, width)
        self.time_embedding = VectorEmbedding(256, width)
        self.pooled_embedding = VectorEmbedding(config.pooled_width, width)
        self.modulation = nn.Linear(width, sum(config.modulations) * width)
        self.blocks = nn.ModuleList(JointBlock(*shape) for _ in range(config.depth - 1))
        self.blocks.append((JointBlock if config.single_depth else LastJointBlock)(*shape))
        self.single_blocks = nn.ModuleList(SingleBlock(*shape) for _ in range(config.single_depth))
        self.final = nn.Linear(width, patch)
        self.initialise()

    def initialise(self) -> None:
        """Xavier-uniform matrices and zero biases; zero for modulation and output."""
        initialise_linears(self, closed=[self.modulation, self.final])

    def spread_tokens(self, context: Context) -> None:
        """Deal the image tokens out to workers that are given the same inputs from now on.

        Every one of them has all of the text, and returns the whole prediction; see `Context` about
        its gradients.

        Raises:
            UserError: the heads do not divide.
        """
        context.check_heads(self.config.heads)
        self.context = context
        for block in (*self.blocks, *self.single_blocks):
            assert isinstance(block, JointBlock | LastJointBlock | SingleBlock)
            block.context = context

    def forward(self, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
        """Predict at time `t`.

        Args:
            x_t: (B, C, H, W) or (B, C, T, H, W) noisy latents.
            t: (B,) in [0, 1], noise at 1.
            cond: B captions; padded tokens change nothing.

        Returns:
            The shape of `x_t`.

        Raises:
            UserError: H or W is not a multiple of the patch size, other channels, a picture larger
                than the fixed positions, or a video for them.
        """
        check_channels(x_t, self.patch_embedding, self.config.patch_size)
        patches, grid = patchify(x_t, self.config.patch_size)
        mask = visible_keys(F.pad(cond.mask, (0, patches.shape[1]), value=True), patches.dtype)
        share = self.context.share  # from here on N is this worker's, but for the mask
        image, text = self.patch_embedding(share(patches, 1)), self.text_embedding(cond.tokens)
        turn = None
        if self.config.rotary is None:
            image = image + share(self._positions(grid, x_t.device).to(patches.dtype), 0)
        else:
            turn = self._turn(grid, text.shape[1], self.config.rotary, x_t.device)
        rows = self.modulation(F.silu(self._condition(t, cond)))
        rows = rows.unflatten(1, (1, -1, self.config.width))  # (B, 1, all rows, D)
        *modulations, ends = rows.split(self.config.modulations, dim=2)
        joint, single = modulations[: self.config.depth], modulations[self.config.depth :]
        image_turn = turn and (turn[0][text.shape[1] :], turn[1][text.shape[1] :])
        for block, modulation in zip(self.blocks, joint, strict=True):
            image, text = block(image, text, modulation, image_turn, mask)
        tokens = torch.cat([text, image], dim=1)  # (B, M, D)
        for block, modulation in zip(self.single_blocks, single, strict=True):
            tokens = block(tokens, modulation, turn, mask, text.shape[1])
        image = tokens[:, text.shape[1] :]
        patches = self.final(modulate(image, *ends.unbind(2)))
        patches = self.context.whole(patches, 1)
        return unpatchify(patches, grid, self.config.patch_size, x_t.ndim == 5)

    def _condition(self, t: Tensor, cond: TextCondition) -> Tensor:
        """What modulates every block: time and pooled caption, (B, D)."""
        waves = timestep_waves(1000 * t).to(cond.pooled.dtype)
        return self.time_embedding(waves) + self.pooled_embedding(cond.pooled)

    def _positions(self, grid: Grid, device: torch.device) -> Tensor:
        """(N, D) fixed positions, out of the middle of the square of them."""
        frames, h, w = grid
        most = self.config.position_grid
        if frames > 1 or max(h, w) > most:
            raise UserError(
                f"{frames} frames of {h} x {w} tokens, but fixed positions are for one frame of at "
                f"most {most} x {most}: set `rotary`, or a larger `position_grid`"
            )
        step = self.config.position_span / most
        rows, columns = ((torch.arange(n, device=device) + (most - n) // 2) * step for n in (h, w))
        return place_waves(rows, columns, self.config.width)

    def _turn(
        self, grid: Grid, text_tokens: int, channels: tuple[int, int, int], device: torch.device
    ) -> Turn:
        """Cosines and signed sines of all tokens, (M, K) each; text does not turn."""
        frame, row, column = (count // 2 for count in channels)
        base = self.config.rotary_base
        turns = grid_rotary(grid, (frame, row, column), device, base, centred=False)
        cosines, sines = (self.context.share(part, 0) for part in turns)
        cosines, sines = torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)
        above = (0, 0, text_tokens, 0)
        return F.pad(cosines, above, value=1.0), F.pad(sines, above)
