"""Inpainting for networks trained to do it: mask and masked latent as further channels
(Rombach et al. 2022, Sec. 4.5).

The mask says what is *known*: 1 there, 0 where the network is to paint. So nothing known is all
zeros, which is also how `channels` writes that the condition is absent. The other convention, 1
where to paint, is 1 - known.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def inpainting_channels(x0: Tensor, known: Tensor) -> Tensor:
    """What is known, then where.

    Args:
        x0: (B, C, ...) latents; what they are outside the known region does not matter.
        known: (B, 1, ...) 1 where `x0` is given, 0 where it is to be painted.

    Returns:
        (B, C + 1, ...) a condition for `ChannelConditioned`.

    Raises:
        ValueError: the mask is not one channel of the latent's grid.
    """
    check_mask(x0, known)
    return torch.cat([torch.where(known > 0, known * x0, 0.0), known.to(x0)], dim=1)


def latent_mask(known: Tensor, factor: int) -> Tensor:
    """(B, 1, H, W) known pixels -> known latents: those all of whose pixels are known.

    Raises:
        ValueError: a side that is no multiple of `factor`.
    """
    if known.shape[-2] % factor or known.shape[-1] % factor:
        raise ValueError(f"a mask of {tuple(known.shape[-2:])} does not divide by {factor}")
    return -F.max_pool2d(-known, factor)  # the smallest of each square


def check_mask(x0: Tensor, known: Tensor) -> None:
    """Refuse a mask that does not fit.

    Raises:
        ValueError: naming both shapes.
    """
    expected = (len(x0), 1, *x0.shape[2:])
    if known.shape != expected:
        raise ValueError(
            f"a latent of {tuple(x0.shape)} has a mask of {expected}, got {tuple(known.shape)}"
        )
