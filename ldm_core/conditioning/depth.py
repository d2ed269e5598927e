"""A stand-in for depth as a hint, made from a picture's gradients without weights.

No depth is measured. Brightness changes little within an object and jumps between objects, so small
gradients are taken for shading and dropped, and the relief that has the remaining ones is found by
least squares (Horn 1974, "Determining lightness from an image"; the integration as in Frankot &
Chellappa 1988):

    laplace h = div(g [|g| >= threshold]),    no slope across the border.

The result is layers: nearly flat within objects, brighter ones higher.

Shapes: B batch, H x W pixels in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def depth_proxy(pixels: Tensor, threshold: float = 0.1) -> Tensor:
    """The relief of the large gradients.

    Args:
        pixels: (B, C, H, W); channels are averaged.
        threshold: differences of neighbours below it count as none; 0 gives the brightness back.

    Returns:
        (B, 1, H, W) of mean 0.
    """
    brightness = pixels.mean(dim=1, keepdim=True)
    right, down = (_large(brightness.diff(dim=dim), threshold) for dim in (-1, -2))
    divergence = F.pad(right, (1, 1)).diff(dim=-1) + F.pad(down, (0, 0, 1, 1)).diff(dim=-2)
    return solve_poisson(divergence)


def solve_poisson(divergence: Tensor) -> Tensor:
    """h of mean 0 with the given 5-point Laplacian and no slope across the border: (..., H, W).

    Mirrored at both axes the problem is periodic, and diagonal after a Fourier transform.
    """
    height, width = divergence.shape[-2:]
    mirrored = torch.cat([divergence, divergence.flip(-1)], dim=-1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], dim=-2)
    eigenvalues = _second_difference(height, divergence)[:, None] + _second_difference(
        width, divergence
    )
    eigenvalues[0, 0] = 1  # of the mean, which a divergence does not have
    spectrum = torch.fft.fft2(mirrored) / eigenvalues
    spectrum[..., 0, 0] = 0
    return torch.fft.ifft2(spectrum).real[..., :height, :width]


def _large(difference: Tensor, threshold: float) -> Tensor:
    return torch.where(difference.abs() >= threshold, difference, 0.0)


def _second_difference(length: int, like: Tensor) -> Tensor:
    """Eigenvalues 2 cos(pi k / n) - 2 on a circle of 2 n points, (2 n,)."""
    k = torch.arange(2 * length, dtype=like.dtype, device=like.device)
    return 2 * torch.cos(math.pi * k / length) - 2
