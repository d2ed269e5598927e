"""Diffusers' transformers and U-Nets of a few thousand random weights, and inputs for them."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

from ldm_core.conditioning.text import TextCondition

B, L, TEXT, POOLED = 2, 5, 12, 6
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
CHANNELS = {"in_channels": 4, "out_channels": 4}
LEARNED_VARIANCE = {"in_channels": 4, "out_channels": 8}
JOINT = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
UNET = {
    "sample_size": 8, **CHANNELS, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT, "attention_head_dim": 4, "norm_num_groups": 4,
}  # fmt: skip


def dit(**config):
    """As the published ones, whose blocks all embed time and label alike."""
    defaults = {"sample_size": 8, "num_embeds_ada_norm": 10, "num_layers": 2}
    model = DiTTransformer2DModel(**{**HEADS, **LEARNED_VARIANCE, **defaults, **config})
    model = shaken(model)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def sd3(**config):
    defaults = {
        "sample_size": 8, "num_layers": 2, "caption_projection_dim": 16, "pos_embed_max_size": 12
    }  # fmt: skip
    return shaken(SD3Transformer2DModel(**{**HEADS, **CHANNELS, **JOINT, **defaults, **config}))


def flux(**config):
    defaults = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4)
    }  # fmt: skip
    return shaken(FluxTransformer2DModel(**{**HEADS, **JOINT, **defaults, **config}))


def pixart(**config):
    defaults = {
        "num_layers": 1, "sample_size": 8, "cross_attention_dim": 12, "caption_channels": TEXT,
        "attention_head_dim": 6,
    }  # fmt: skip
    return shaken(PixArtTransformer2DModel(**{**HEADS, **LEARNED_VARIANCE, **defaults, **config}))


def wan(**config):
    defaults = {
        "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1, "rope_max_seq_len": 32,
        "attention_head_dim": 12,
    }  # fmt: skip
    return shaken(WanTransformer3DModel(**{**HEADS, **CHANNELS, **defaults, **config}))


def hunyuan_video(**config):
    defaults = {
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT,
        "pooled_projection_dim": POOLED, "rope_axes_dim": (2, 2, 4),
    }  # fmt: skip
    return shaken(HunyuanVideoTransformer3DModel(**{**HEADS, **CHANNELS, **defaults, **config}))


def ltx(**config):
    defaults = {"cross_attention_dim": 16, "num_layers": 1, "caption_channels": TEXT}
    return shaken(LTXVideoTransformer3DModel(**{**HEADS, **CHANNELS, **defaults, **config}))


def lumina2(**config):
    defaults = {
        "sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 1, "multiple_of": 16,
        "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2, "cap_feat_dim": TEXT,
        "axes_dim_rope": (2, 2, 4), "axes_lens": (32, 16, 16),
    }  # fmt: skip
    return shaken(Lumina2Transformer2DModel(**{**defaults, **config}))


def unet(**config):
    return shaken(UNet2DConditionModel(**{**UNET, **config}))


def unet_xl(**config):
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + POOLED,
        **config,
    )


FAMILIES = {
    "dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux, "lumina2": lumina2, "wan": wan,
    "hunyuan_video": hunyuan_video, "ltx": ltx, "unet": unet, "unet_xl": unet_xl,
}  # fmt: skip
VIDEO = {"wan", "hunyuan_video", "ltx"}


def shaken(model, seed=0, size=0.05):
    """In eval mode, with every parameter moved a little, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def captions(lengths=(L, L), seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), max(lengths), TEXT, generator=generator) * mask[..., None]
    return TextCondition(tokens, mask, torch.randn(len(lengths), POOLED, generator=generator))


def latents(name, seed=2):
    shape = (B, 4, 3, 8, 8) if name in VIDEO else (B, 4, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def condition(name, lengths=(L, L)):
    return torch.tensor([3, 7]) if name == "dit" else captions(lengths)
