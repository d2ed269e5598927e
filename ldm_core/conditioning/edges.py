"""Edges as a hint: Canny's detector (Canny 1986), which has no weights.

Blur, slope, thinning across the edge, and two thresholds: a weak edge counts where it hangs
together with a strong one.

Shapes: B batch, C channels, H x W pixels in [-1, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_TIE = 1e-4  # relative; slopes of a symmetric edge are equal up to rounding


def canny_edges(pixels: Tensor, low: float = 0.05, high: float = 0.15, blur: float = 1.0) -> Tensor:
    """Lines along the edges, one pixel wide; where they run diagonally, a staircase.

    Args:
        pixels: (B, C, H, W).
        low: slope, in values per pixel, from which on a pixel may belong to an edge.
        high: slope that makes an edge of what hangs together with it.
        blur: standard deviation of the blur in pixels; 0 for none.

    Returns:
        (B, 1, H, W) of 0 and 1.

    Raises:
        ValueError: thresholds that are not 0 < low <= high.
    """
    dx, dy = sobel(gaussian_blur(pixels, blur))
    slope = torch.hypot(dx, dy)
    steepest = slope.argmax(dim=1, keepdim=True)  # so that colours of one brightness differ, too
    slope, dx, dy = (part.gather(1, steepest) for part in (slope, dx, dy))
    return hysteresis(thin(slope, dx, dy), low, high).to(pixels.dtype)


def gaussian_blur(pixels: Tensor, std: float) -> Tensor:
    """Convolve with a Gaussian cut at 3 standard deviations; the border repeats."""
    radius = math.ceil(3 * std)
    if radius == 0:
        return pixels
    x = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    kernel = torch.softmax(-(x**2) / (2 * std**2), dim=0)
    return _separable(pixels, kernel, kernel)


def sobel(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes to the right and down in values per pixel, (B, C, H, W) each; the border repeats."""
    smooth = torch.tensor([0.25, 0.5, 0.25], dtype=pixels.dtype, device=pixels.device)
    slope = torch.tensor([-0.5, 0.0, 0.5], dtype=pixels.dtype, device=pixels.device)
    return _separable(pixels, slope, smooth), _separable(pixels, smooth, slope)


def thin(slope: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Keep a slope (B, 1, H, W) where it is largest across the edge, in one of 4 directions.

    Of two equal neighbours the upper or left one stays.
    """
    flat, steep = math.tan(math.pi / 8), math.tan(3 * math.pi / 8)
    across = dy.abs() <= flat * dx.abs()
    along = dy.abs() >= steep * dx.abs()
    falling = ~across & ~along & (dx * dy > 0)
    kept = torch.zeros_like(slope)
    rising = ~across & ~along & ~falling
    for chosen, step in ((across, (0, 1)), (along, (1, 0)), (falling, (1, 1)), (rising, (1, -1))):
        before, after = _neighbours(slope, *step)
        largest = (slope > before * (1 + _TIE)) & (slope >= after * (1 - _TIE))
        kept = torch.where(chosen & largest, slope, kept)
    return kept


def hysteresis(slope: Tensor, low: float, high: float) -> Tensor:
    """(B, 1, H, W) bool: at least `low` and joined, over any of 8 neighbours, to at least `high`.

    Raises:
        ValueError: thresholds that are not 0 < low <= high.
    """
    if not 0 < low <= high:
        raise ValueError(f"thresholds are 0 < low <= high, got low {low:g} and high {high:g}")
    candidates, edges = slope >= low, slope >= high
    while True:
        grown = candidates & (F.max_pool2d(edges.float(), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def _separable(pixels: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Correlate every channel with `across` along its rows and `down` along its columns."""
    single = pixels.flatten(0, 1)[:, None]  # (B * C, 1, H, W)
    i, j = len(down) // 2, len(across) // 2
    padded = F.pad(single, (j, j, i, i), mode="replicate")
    rows = F.conv2d(padded, across.view(1, 1, 1, -1))
    return F.conv2d(rows, down.view(1, 1, -1, 1)).view_as(pixels)


def _neighbours(slope: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """The values one step before and one step after every pixel; 0 outside."""
    height, width = slope.shape[-2:]
    padded = F.pad(slope, (1, 1, 1, 1))

    def moved(y: int, x: int) -> Tensor:
        return padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width]

    return moved(-down, -right), moved(down, right)
