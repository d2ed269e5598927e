"""A segmentation by colour as a hint: every pixel gets the nearest of a few colours, given ones or
the picture's own (k-means, Lloyd 1982).

Shapes: B batch, C channels, H x W pixels in [-1, 1], K colours.
"""

import torch
from einops import rearrange
from torch import Tensor


def color_segments(pixels: Tensor, palette: Tensor) -> Tensor:
    """Which colour is nearest.

    Args:
        pixels: (B, C, H, W).
        palette: (B, K, C), or (K, C) for all pictures.

    Returns:
        (B, H, W) int64 in [0, K); of equally near colours the first.
    """
    points = rearrange(pixels, "b c h w -> b (h w) c")
    return _nearest(points, palette.expand(len(points), *palette.shape[-2:])).view(
        len(pixels), *pixels.shape[2:]
    )


def segmentation_hint(pixels: Tensor, palette: Tensor) -> Tensor:
    """The picture in its nearest colours of the palette: (B, C, H, W)."""
    segments = color_segments(pixels, palette)
    palettes = palette.expand(len(pixels), *palette.shape[-2:])
    colors = palettes[torch.arange(len(pixels), device=pixels.device)[:, None, None], segments]
    return rearrange(colors, "b h w c -> b c h w")


def dominant_colors(pixels: Tensor, count: int, iterations: int = 10) -> Tensor:
    """Each picture's own palette, the same every time.

    Each colour in turn is the pixel farthest from the mean and from those chosen before (Gonzalez
    1985); then each moves to the mean of its pixels, `iterations` times.

    Args:
        pixels: (B, C, H, W).
        count: K, how many colours.
        iterations: of k-means; a colour without pixels stays where it is.

    Returns:
        (B, K, C).
    """
    points = rearrange(pixels, "b c h w -> b (h w) c")
    palette = points.mean(dim=1, keepdim=True)  # the mean itself is dropped below
    for _ in range(count):
        farthest = _distances(points, palette).amin(dim=-1).argmax(dim=1)  # (B,)
        color = points[torch.arange(len(points), device=points.device), farthest]
        palette = torch.cat([palette, color[:, None]], dim=1)
    palette = palette[:, 1:]
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(_nearest(points, palette), count).to(points)
        sizes = member.sum(dim=1)[..., None]  # (B, K, 1)
        means = member.mT @ points / sizes.clamp(min=1)
        palette = torch.where(sizes > 0, means, palette)
    return palette


def _nearest(points: Tensor, palette: Tensor) -> Tensor:
    """(B, N, C) and (B, K, C) -> (B, N)."""
    return _distances(points, palette).argmin(dim=-1)


def _distances(points: Tensor, palette: Tensor) -> Tensor:
    """(B, N, K), without the rounding that goes with doing it as a matrix product."""
    return torch.cdist(points, palette, compute_mode="donot_use_mm_for_euclid_dist")
