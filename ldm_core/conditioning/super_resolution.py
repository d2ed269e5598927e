"""Super-resolution: the low-resolution latent as further channels, noised a little (Ho et al. 2021,
"Cascaded diffusion models", Sec. 4.2; Saharia et al. 2022, Sec. 2.3).

In training the low-resolution latent is one made by encoding; when sampling it comes from another
model, whose flaws the noise drowns. The network is told the noise level, at training a random one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.conditioning.channels import ChannelConditioned
from ldm_core.conditioning.numbers import NumberConditioned
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.process import Process, add_noise

LATENT, LEVEL = "low_resolution", "low_resolution_level"


def super_resolution(network: nn.Module, channels: int, pooled_width: int) -> NumberConditioned:
    """A network that reads what `with_low_resolution` adds.

    Args:
        network: widened by `channels` (see `ldm_core.conditioning.channels`).
        channels: of the low-resolution latent.
        pooled_width: of the caption's vector.
    """
    concatenating = ChannelConditioned(network, {LATENT: channels})
    return NumberConditioned(concatenating, LEVEL, 1, pooled_width, (0.5, 64.0))


def with_low_resolution(
    cond: TextCondition, low: Tensor, process: Process, level: Tensor, eps: Tensor
) -> TextCondition:
    """Add the low-resolution latent, resampled to the full grid and then noised, and its level.

    Args:
        cond: B captions.
        low: (B, C, h, w) latents of the small pictures.
        process: what the noise level is a time of.
        level: (B,) times in [0, end]; at 0 the latent is as it is.
        eps: (B, C, H, W) standard normal noise, H x W the grid of the large picture.

    Raises:
        ValueError: batch or channels of latent and noise differ.
    """
    if low.shape[:2] != eps.shape[:2]:
        raise ValueError(
            f"low-resolution latents {tuple(low.shape)} and noise {tuple(eps.shape)}: "
            "batch and channels are to be the same"
        )
    large = F.interpolate(low, size=eps.shape[2:], mode="bilinear", align_corners=False)
    noised = add_noise(process, large, eps, level)
    return cond.with_extra(LATENT, noised).with_extra(LEVEL, level[:, None])
