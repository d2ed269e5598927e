"""A new autoencoder of diffusers' own class, the module that is trained, and latent statistics."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.autoencoders.autoencoder import Posterior

INITIAL_LOGVAR = -6.0


def new_autoencoder(
    block_channels: tuple[int, ...],
    latent_channels: int,
    layers_per_block: int,
    size: int,
    seed: int,
) -> Any:  # AutoencoderKL, whose methods are hidden from type checkers by its mixins
    """A small `AutoencoderKL` with seeded weights; downsampling 2^(len(block_channels) - 1).

    The log-variance starts at -6: with diffusers' default of 0 the decoder sees little but noise
    for the first hundreds of steps.
    """
    from diffusers import AutoencoderKL  # here: it takes seconds, and drivers need it not

    levels = len(block_channels)
    with torch.random.fork_rng():  # the class initialises from the global generator
        torch.manual_seed(seed)
        network: Any = AutoencoderKL(
            block_out_channels=block_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=math.gcd(8, *block_channels),
            mid_block_add_attention=False,
            sample_size=size,
            scaling_factor=1.0,
        )
    with torch.no_grad():
        network.quant_conv.weight[latent_channels:] *= 0.1
        network.quant_conv.bias[latent_channels:] = INITIAL_LOGVAR
    return network.to(memory_format=torch.channels_last)


class Reconstruction(nn.Module):
    """Pixels -> (reconstruction, posterior mean, posterior log-variance), in one forward pass.

    One pass, because DDP averages gradients of what its `forward` computed. On some steps it may
    halve the latents, to be compared with halved pictures (EQ-VAE, Kouzelis et al. 2025, with the
    scale 1/2 alone): an autoencoder is otherwise free to put what a picture shows into fine,
    irregular patterns, which a diffusion model is slow to learn.
    """

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(
        self, pixels: Tensor, eps: Tensor, halve: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`pixels` (B, 3, H, W) in [-1, 1], `eps` (B, C, h, w) standard normal.

        With `halve` the reconstruction is that of `halved(pixels)`.
        """
        distribution = self.autoencoder.encode(pixels).latent_dist
        posterior = Posterior(distribution.mean, distribution.logvar)
        latents = posterior.sample(eps)
        decoded = self.autoencoder.decode(halved(latents) if halve else latents).sample
        return decoded, posterior.mean, posterior.logvar


def halved(images: Tensor) -> Tensor:
    """Pictures or latents (B, C, H, W) at half the size, each value the mean of four."""
    return F.avg_pool2d(images, 2)


def latent_statistics(posterior: Posterior) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents drawn from posteriors (N, C, h, w).

    The law of total variance: the variance of the means plus the mean of the variances.
    """
    dims = (0, 2, 3)
    mean = posterior.mean.double().mean(dim=dims)
    variance = posterior.mean.double().var(dim=dims) + posterior.logvar.double().exp().mean(dims)
    return mean.tolist(), variance.sqrt().tolist()


def psnr(pixels: Tensor, decoded: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB, (B,), of pictures in [-1, 1] (peak to peak 2)."""
    error = (decoded.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)
