"""A DiT small enough for tests, in float64 and with nothing at zero, and a batch for it."""

import torch

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.conditioning.text import TextCondition

CONFIG = DiTConfig(
    in_channels=3, latent_size=(8, 8), patch_size=2, width=32, depth=3, heads=2,
    text_width=10, pooled_width=6,
)  # fmt: skip
B, C, SIZE, PATCH, WIDTH, POOLED = 4, 3, 8, 2, 32, 6


def trained_dit(seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    return opened(DiT(CONFIG).double())


def opened(module):
    """Add noise to every parameter, so that none is zero."""
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def batch() -> tuple[torch.Tensor, torch.Tensor, TextCondition]:
    """x_t, t, captions."""
    torch.manual_seed(1)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    tokens = torch.randn(B, 5, 10, dtype=torch.float64) * mask[..., None]
    cond = TextCondition(tokens, mask, torch.randn(B, POOLED, dtype=torch.float64))
    x_t = torch.randn(B, C, SIZE, SIZE, dtype=torch.float64)
    return x_t, torch.rand(B, dtype=torch.float64), cond
