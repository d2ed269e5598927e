"""8-bit pictures <-> tensors in [-1, 1]."""

import numpy as np
import torch


def to_pixels(image: np.ndarray) -> torch.Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).movedim(-1, -3)
    return pixels.contiguous().float() / 127.5 - 1


def to_image(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) or (B, 3, H, W) in [-1, 1] -> (H, W, 3) or (B, H, W, 3) uint8, clamped."""
    levels = ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.to(torch.uint8).movedim(-3, -1).cpu().numpy()
