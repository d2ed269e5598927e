"""What an autoencoder is trained on: pixels, a perceptual term without weights, and a thin KL.

Rombach et al. 2022 (LDM), section 3.1 and appendix G, with LPIPS replaced by something that needs
no downloaded network. Errors are taken in an opponent colour space with chroma counted double:
in RGB a small coloured shape is mostly a grey error, and hues are learned last of all. Differences
of image gradients at several scales punish blurred edges, which L2 on pixels hardly notices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_core.autoencoders.autoencoder import Posterior

CHROMA_GAIN = 2.0
L1_WEIGHT = 0.1


@dataclass(frozen=True)
class AutoencoderLoss:
    """Per-picture terms, (B,) each; `total` is what is minimised."""

    total: Tensor
    reconstruction: Tensor
    perceptual: Tensor
    kl: Tensor


def autoencoder_loss(
    pixels: Tensor,
    decoded: Tensor,
    posterior: Posterior,
    kl_weight: float,
    perceptual_weight: float,
) -> AutoencoderLoss:
    """L2 + a little L1 + perceptual + KL, for pictures (B, 3, H, W) in [-1, 1]."""
    error = opponent_colours(decoded - pixels)
    per_pixel = error.square() + L1_WEIGHT * error.abs()
    reconstruction = per_pixel.mean(dim=(1, 2, 3))
    perceptual = gradient_pyramid(error)
    kl = kl_to_standard_normal(posterior)
    total = reconstruction + perceptual_weight * perceptual + kl_weight * kl
    return AutoencoderLoss(total, reconstruction, perceptual, kl)


def opponent_colours(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) RGB to grey, red-green and yellow-blue, orthonormal but for the chroma gain."""
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    axes = axes / axes.norm(dim=1, keepdim=True)
    axes[1:] *= CHROMA_GAIN
    return torch.einsum("ij, b j h w -> b i h w", axes.to(rgb), rgb)


def gradient_pyramid(error: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute horizontal and vertical difference of (B, 3, H, W) at `levels` scales, (B,).

    Gradients and pooling are linear, so this is the distance of the two pictures' gradients.
    """
    total = error.new_zeros(len(error))
    for _ in range(levels):
        dx = (error[..., :, 1:] - error[..., :, :-1]).abs().mean(dim=(1, 2, 3))
        dy = (error[..., 1:, :] - error[..., :-1, :]).abs().mean(dim=(1, 2, 3))
        total = total + dx + dy
        error = F.avg_pool2d(error, 2)
    return total / levels


def kl_to_standard_normal(posterior: Posterior) -> Tensor:
    """KL(q || N(0, I)) summed over the latent, nats per picture, (B,)."""
    mean, logvar = posterior.mean, posterior.logvar
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))
