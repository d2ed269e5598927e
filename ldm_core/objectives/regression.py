"""The distances objectives end in."""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""(prediction (B, ...), target (B, ...)) -> (B,)."""


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over all but the batch dimension: (B, ...) -> (B,).

    Half-precision inputs are subtracted in float32.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)


def pseudo_huber(prediction: Tensor, target: Tensor, offset: float = 0.00054) -> Tensor:
    """sqrt(mean square + c^2) - c: quadratic for errors far below c, linear above it.

    Song & Dhariwal 2024, Eq. 8, divided by the root of the dimension d: their c is 0.00054 sqrt(d).
    """
    square = mean_square(prediction, target)
    return square / ((square + offset**2).sqrt() + offset)  # the difference, without cancellation
