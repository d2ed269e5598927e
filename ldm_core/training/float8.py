"""Matrix products of linear layers in 8-bit floats, where a device has units for them.

Micikevicius et al. 2022, "FP8 formats for deep learning": values and weights with 4 bits of
exponent and 3 of mantissa, gradients with 5 and 2. A tensor has one scale, from its largest value
as it is now, and sums are kept in float32. Weights stay as they are, and so do their names.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_core.errors import UserError

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
_UNIT = 16  # the units take multiples of so many rows and columns


def compute_in_float8(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Let the blocks' linear layers compute in 8 bits, in place.

    To be done before sharding and compiling; without compiling it is slower than bfloat16.

    Raises:
        UserError: no such device.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"float8 takes a GPU of compute capability 8.9 or more, and this is {device}: use bf16"
        )
    for block in blocks:
        use_float8(block)


def use_float8(block: nn.Module) -> None:
    """Make a block's linear layers `Float8Linear`s, in place and on any device; those whose sides
    are no multiples of 16 stay as they are.
    """
    for module in block.modules():
        if type(module) is nn.Linear and not (
            module.in_features % _UNIT + module.out_features % _UNIT
        ):
            module.__class__ = Float8Linear


class Float8Linear(nn.Linear):
    """A linear layer whose three matrix products, forward and backward, are of 8-bit floats."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), of the dtype that autocast says, or else that of `x`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.to(dtype).flatten(0, -2)
        short = -len(rows) % _UNIT  # the backward pass sums over rows
        y: Tensor = _Product.apply(F.pad(rows, (0, 0, 0, short)), self.weight)
        y = y[: len(rows)].unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x (M, K), W (N, K) -> x W^T (M, N). For the backward pass both are kept in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        x8, of_x = _rounded(x, VALUES)
        w8, of_w = _rounded(weight, VALUES)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        ctx.dtypes = x.dtype, weight.dtype
        return torch._scaled_mm(x8, w8.t(), of_x, of_w, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x8, of_x, w8, of_w = ctx.saved_tensors
        of_values, of_weights = ctx.dtypes
        g8, of_g = _rounded(gradient, GRADIENTS)
        to_x = torch._scaled_mm(g8, _columns(w8), of_g, of_w, out_dtype=of_values)
        to_w = torch._scaled_mm(g8.t().contiguous(), _columns(x8), of_g, of_x, out_dtype=of_weights)
        return to_x, to_w


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and what these are to be multiplied by: x's largest value is the format's."""
    scale = x.detach().abs().amax().float().clamp(min=1e-30) / torch.finfo(dtype).max
    return (x / scale).to(dtype).contiguous(), scale


def _columns(x: Tensor) -> Tensor:
    """The same matrix with its columns in one piece, as the units want the second factor."""
    return x.t().contiguous().t()
