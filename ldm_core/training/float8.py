"""Matrix products of linear layers in 8-bit floats, where a device has units for them."""

from collections.abc import Iterable

import torch
from torch import nn

from ldm_core.errors import UserError


def compute_in_float8(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Let torchao replace the blocks' linear layers, in place; weights stay as they are.

    With a scale per tensor (Micikevicius et al. 2022). To be done before sharding and compiling;
    without compiling it is slower than bfloat16.

    Raises:
        UserError: no such device, or torchao is not installed.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            f"float8 takes a GPU of compute capability 8.9 or more, and this is {device}: use bf16"
        )
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise UserError("float8 needs torchao: pip install torchao, or use bf16") from error
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    """The units take multiples of 16."""
    if not isinstance(module, nn.Linear):
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0
