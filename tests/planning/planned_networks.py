"""Small networks of every kind, with inputs for them on any device."""

import torch

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.conditioning.text import TextCondition

TEXT, POOLED, LENGTH = 24, 16, 7
WORDS = {"patch_size": 2, "in_channels": 4, "text_width": TEXT, "pooled_width": POOLED}
DIT = DiTConfig(latent_size=(8, 8), width=64, depth=3, heads=4, **WORDS)
DIT_VIDEO = DIT.model_copy(update={"frame_pairs": 2})
MMDIT = MMDiTConfig(width=64, depth=2, single_depth=2, heads=4, rotary=(4, 6, 6), **WORDS)
SD3 = MMDiTConfig(width=64, depth=3, heads=4, qk_norm=False, **WORDS)
CASES = {
    "dit": (DIT, (8, 8)),
    "dit-video": (DIT_VIDEO, (3, 8, 4)),
    "mmdit": (MMDIT, (8, 8)),
    "mmdit-video": (MMDIT, (3, 8, 4)),
    "sd3": (SD3, (8, 8)),
}


def build(config, device="cpu"):
    with torch.device(device):
        return DiT(config) if isinstance(config, DiTConfig) else MMDiT(config)


def inputs(size, device="cpu", batch=1, length=LENGTH, config=DIT):
    torch.manual_seed(0)
    with torch.device(device):
        caption = TextCondition(
            torch.randn(batch, length, config.text_width),
            torch.ones(batch, length, dtype=torch.bool),
            torch.randn(batch, config.pooled_width),
        )
        return torch.randn(batch, config.in_channels, *size), torch.rand(batch), caption
