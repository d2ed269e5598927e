"""Size and crop micro-conditioning (Podell et al. 2023, Sec. 2.2): what a picture was before it
became a training sample, so that small or cut originals teach no blur and no cut heads.

When sampling one asks for a large original without a crop.
"""

import torch
from torch import Tensor, nn

from ldm_core.conditioning.numbers import NumberConditioned

NAME = "size_and_crop"


def size_and_crop_conditioned(network: nn.Module, pooled_width: int) -> NumberConditioned:
    """A network that reads the condition "size_and_crop", (B, 6) in pixels.

    Waves of 2 pi to 20,000 pi pixels, 128 pairs for each number, as in SDXL.
    """
    return NumberConditioned(network, NAME, 6, pooled_width, (1e-4, 1.0), pairs=128)


def size_and_crop(original: Tensor, crop: Tensor, target: Tensor) -> Tensor:
    """The six numbers in their order.

    Args:
        original: (B, 2) height and width of the file's picture.
        crop: (B, 2) top and left corner of the cut, after resampling.
        target: (B, 2) height and width of the training sample.

    Returns:
        (B, 6) float32, which holds every picture's size exactly.

    Raises:
        ValueError: one of them is not (B, 2).
    """
    shapes = [tuple(part.shape) for part in (original, crop, target)]
    if any(shape != (len(original), 2) for shape in shapes):
        raise ValueError(f"original, crop and target are (B, 2) each, got {shapes}")
    return torch.cat([original, crop, target], dim=1).float()
