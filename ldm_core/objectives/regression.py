"""The squared error every objective ends in."""

import torch
from torch import Tensor


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over all but the batch dimension: (B, ...) -> (B,).

    Half-precision inputs are subtracted in float32.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(dim=1)
