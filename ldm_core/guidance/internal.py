"""Internal guidance (Zhou et al. 2025, "Guiding a diffusion transformer with the internal dynamics
of itself"): the bad model is the middle of the good one.

A second head predicts from a middle block. It is trained along, L_final + lambda L_middle, and at
sampling D_w = D_middle + w (D_final - D_middle) costs one pass and no empty caption:
`Guided(InternalPair(network, process, prediction), w)`.
"""

from einops import rearrange
from torch import Tensor, nn

from ldm_core.backbones.hooks import recorded
from ldm_core.backbones.layers import TimeEmbedding
from ldm_core.diffusion.denoiser import Condition, Denoiser
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, add_noise, batch_time
from ldm_core.objectives.regression import mean_square


class TokenHead(nn.Module):
    """A middle block's image tokens -> a prediction: norm, turned by the time, then linear."""

    def __init__(self, width: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.time_embedding = TimeEmbedding(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels * patch_size**2)
        for linear in (self.modulation, self.out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`tokens` (B, N, D) of `x_t` (B, C, H, W) at `t` (B,) -> (B, C, H, W)."""
        p = self.patch_size
        condition = nn.functional.silu(self.time_embedding(t, tokens.dtype))[:, None]  # (B, 1, D)
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        patches = self.out(self.norm(tokens) * (1 + scale) + shift)
        return rearrange(
            patches, "b (h w) (c p q) -> b c (h p) (w q)", h=x_t.shape[-2] // p, p=p, q=p
        )


class TwoHeaded(nn.Module):
    """A network and a head on one of its blocks, which is handed the block's output.

    The network itself stays as it is, with its own state dict.
    """

    def __init__(self, network: nn.Module, block: str, head: nn.Module) -> None:
        """Put `head`, (block's output, x_t, t) -> a prediction, on the block of that name.

        Raises:
            ValueError: the network has no such block.
        """
        super().__init__()
        names = [name for name, _ in network.named_modules() if name]
        if block not in names:
            raise ValueError(
                f"{type(network).__name__} has no block {block!r}: take one of {', '.join(names)}"
            )
        self.network, self.block, self.head = network, block, head

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor]:
        """What the network and the head predict, from one pass: (B, ...) each."""
        with recorded(self.network, self.block) as outputs:
            final = self.network(x_t, t, cond)
        return final, self.head(outputs[self.block], x_t, t)


class InternalPair:
    """The final prediction beside the middle one, for `Guided`; alone, the head is not asked."""

    def __init__(self, network: TwoHeaded, process: Process, prediction: Prediction) -> None:
        """`prediction` is what both heads predict."""
        self.network = network
        self.good = Denoiser(network.network, process, prediction)

    def both(
        self, x_t: Tensor, t: Tensor | float, cond: Condition, target: Prediction
    ) -> tuple[Tensor, Tensor]:
        """The final and the middle estimate."""
        times = batch_time(t, x_t)
        final, middle = self.network(x_t, times, cond)
        meaning = self.good.process, self.good.prediction, target
        return convert(final, x_t, times, *meaning), convert(middle, x_t, times, *meaning)


def internal_guidance_loss(
    network: TwoHeaded,
    process: Process,
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    weight: float = 0.25,
) -> Tensor:
    """L_final + lambda L_middle, each the mean square error of its prediction.

    Args:
        network: with both heads.
        process, prediction: what they are trained on and for.
        x0: (B, ...) latents.
        eps: (B, ...) standard normal noise.
        t: (B,) times.
        cond: B conditions.
        weight: lambda.

    Returns:
        (B,).
    """
    target = prediction.target(x0, eps, t, process)
    final, middle = network(add_noise(process, x0, eps, t), t, cond)
    return mean_square(final, target) + weight * mean_square(middle, target)
