"""Weights of diffusers' transformers for the networks here, which give the same output faster.

What is apart there and one matrix here is stacked: queries, keys and values; the modulations of all
blocks. Three orders differ: a patch's rows (p, q, c there, c, p, q here), scale and shift at the
end, and the pairs that turn, neighbours there and K / 2 apart here.
"""

from typing import Any

import torch
from torch import Tensor

from ldm_core.backbones.class_dit import ClassDiT, ClassDiTConfig
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.errors import UserError

Weights = dict[str, Tensor]


def class_dit_from(model: Any) -> ClassDiT:
    """A DiT with the weights of diffusers' (DiT-XL/2), told the row of its table of 1000 betas.

    Learned variances are left behind: the output is the noise alone.

    Args:
        model: a `DiTTransformer2DModel` whose blocks all embed time and label alike, as the
            published ones do.

    Raises:
        UserError: a block embeds time or label otherwise than the first.
    """
    _check_embedders(model)
    config, first = model.config, model.transformer_blocks[0].norm1.emb
    network = ClassDiT(
        ClassDiTConfig(
            in_channels=config.in_channels,
            latent_size=(config.sample_size, config.sample_size),
            patch_size=config.patch_size,
            width=model.inner_dim,
            depth=config.num_layers,
            heads=config.num_attention_heads,
            classes=config.num_embeds_ada_norm,
            mlp_eps=config.norm_eps,
            timestep=(1000.0, -1.0),
            closed_waves=True,
        )
    )
    modulations = [block.norm1.linear for block in model.transformer_blocks] + [model.proj_out_1]
    weights = (
        _named("patch_embedding", model.pos_embed.proj)
        | _two_layers("time_embedding", first.timestep_embedder)
        | {"label_embedding.weight": first.class_embedder.embedding_table.weight}
        | _named("modulation", *modulations)
        | _final(model.proj_out_2, config.patch_size, config.in_channels)
    )
    for i, block in enumerate(model.transformer_blocks):
        at, attention = f"blocks.{i}", block.attn1
        weights |= _named(f"{at}.qkv", attention.to_q, attention.to_k, attention.to_v)
        weights |= _named(f"{at}.out", attention.to_out[0]) | _mlp(f"{at}.mlp", block.ff)
    return _loaded(network, weights)


def _check_embedders(model: Any) -> None:
    """Each block there has embedders of its own; here there is one for all."""
    first, *others = (block.norm1.emb.state_dict() for block in model.transformer_blocks)
    for index, weights in enumerate(others, start=1):
        wrong = [name for name in first if not torch.equal(first[name], weights[name])]
        if wrong:
            raise UserError(
                f"block {index} embeds time and label otherwise than block 0 ({wrong[0]} differs), "
                "as in a fresh model or one trained through the adapter; a ClassDiT has one "
                "embedding for all blocks: keep this model a DiffusersNetwork, or convert the "
                "published weights before training"
            )


def mmdit_from_sd3(model: Any) -> MMDiT:
    """An MMDiT with the weights of Stable Diffusion 3 or 3.5-large.

    Args:
        model: a `SD3Transformer2DModel`.

    Raises:
        ValueError: a model with a second attention in its blocks (3.5-medium).
    """
    config = model.config
    if config.dual_attention_layers:
        raise ValueError(
            f"blocks {config.dual_attention_layers} have a second attention, which MMDiT lacks: "
            "use the model itself through load_diffusers"
        )
    network = MMDiT(
        MMDiTConfig(
            in_channels=config.in_channels,
            patch_size=config.patch_size,
            width=model.inner_dim,
            depth=config.num_layers,
            heads=config.num_attention_heads,
            text_width=config.joint_attention_dim,
            pooled_width=config.pooled_projection_dim,
            qk_norm=config.qk_norm is not None,
            position_grid=config.pos_embed_max_size,
            position_span=config.sample_size // config.patch_size,
        )
    )
    unturned = torch.arange(model.inner_dim)
    *modulations, last = _joint_modulations(model)
    weights = _conditions(model) | _final(model.proj_out, config.patch_size, config.in_channels)
    weights |= _named("patch_embedding", model.pos_embed.proj)
    weights |= _modulation(modulations, swapped=[last, model.norm_out.linear])
    for i, block in enumerate(model.transformer_blocks):
        weights |= _joint_block(f"blocks.{i}", block, unturned)
    return _loaded(network, weights)


def mmdit_from_flux(model: Any) -> MMDiT:
    """An MMDiT with the weights of Flux, schnell or any without a guidance embedding.

    Args:
        model: a `FluxTransformer2DModel`.

    Raises:
        ValueError: a model distilled with guidance (dev).
    """
    config = model.config
    if config.guidance_embeds:
        raise ValueError(
            "this Flux embeds a guidance scale, which MMDiT is not told: use the model itself "
            "through load_diffusers"
        )
    network = MMDiT(
        MMDiTConfig(
            in_channels=config.in_channels // 4,
            patch_size=2,
            width=model.inner_dim,
            depth=config.num_layers,
            heads=config.num_attention_heads,
            single_depth=config.num_single_layers,
            text_width=config.joint_attention_dim,
            pooled_width=config.pooled_projection_dim,
            rotary=tuple(config.axes_dims_rope),
        )
    )
    turned = half_apart(config.num_attention_heads, config.attention_head_dim)
    modulations = _joint_modulations(model)
    modulations += [block.norm.linear for block in model.single_transformer_blocks]
    weights = _conditions(model) | _named("patch_embedding", model.x_embedder)
    weights |= _modulation(modulations, swapped=[model.norm_out.linear])
    weights |= _named("final", model.proj_out)  # packed latents have the channels slowest already
    for i, block in enumerate(model.transformer_blocks):
        weights |= _joint_block(f"blocks.{i}", block, turned)
    for i, block in enumerate(model.single_transformer_blocks):
        weights |= _single_block(f"single_blocks.{i}", block, turned)
    return _loaded(network, weights)


def half_apart(heads: int, head_width: int) -> Tensor:
    """Where each channel of every head comes from, if its pairs were neighbours: (D,)."""
    return torch.arange(heads * head_width).view(heads, -1, 2).transpose(1, 2).flatten()


def _joint_block(at: str, block: Any, order: Tensor) -> Weights:
    attention = block.attn
    text = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    weights = (
        _qkv(f"{at}.image.qkv", attention.to_q, attention.to_k, attention.to_v, order)
        | _named(f"{at}.image.out", attention.to_out[0])
        | _mlp(f"{at}.image.mlp", block.ff)
        | _scales(f"{at}.image.scale", attention.norm_q, attention.norm_k, order)
    )
    if block.ff_context is not None:
        return (
            weights
            | _qkv(f"{at}.text.qkv", *text, order)
            | _named(f"{at}.text.out", attention.to_add_out)
            | _mlp(f"{at}.text.mlp", block.ff_context)
            | _scales(f"{at}.text.scale", attention.norm_added_q, attention.norm_added_k, order)
        )
    weights |= _named(f"{at}.text_kv", *text[1:])
    if attention.norm_added_k is not None:
        weights[f"{at}.text_scale"] = attention.norm_added_k.weight
    return weights


def _single_block(at: str, block: Any, order: Tensor) -> Weights:
    """Two output layers out of one, with one bias."""
    attention, out = block.attn, block.proj_out
    width = attention.to_q.out_features
    return (
        _qkv(f"{at}.qkv", attention.to_q, attention.to_k, attention.to_v, order)
        | _scales(f"{at}.scale", attention.norm_q, attention.norm_k, order)
        | _named(f"{at}.mlp.hidden", block.proj_mlp)
        | {f"{at}.out.weight": out.weight[:, :width]}
        | {f"{at}.mlp.out.weight": out.weight[:, width:], f"{at}.mlp.out.bias": out.bias}
    )


def _conditions(model: Any) -> Weights:
    embed = model.time_text_embed
    return (
        _named("text_embedding", model.context_embedder)
        | _two_layers("time_embedding", embed.timestep_embedder)
        | _two_layers("pooled_embedding", embed.text_embedder)
    )


def _named(at: str, *linears: Any) -> Weights:
    """The layers' weights and biases, one below the other; a convolution's as a matrix."""
    return {
        f"{at}.weight": torch.cat([linear.weight.flatten(1) for linear in linears]),
        f"{at}.bias": torch.cat([linear.bias for linear in linears]),
    }


def _two_layers(at: str, module: Any) -> Weights:
    return _named(f"{at}.hidden", module.linear_1) | _named(f"{at}.out", module.linear_2)


def _mlp(at: str, feed_forward: Any) -> Weights:
    hidden, _, out = feed_forward.net
    return _named(f"{at}.hidden", hidden.proj) | _named(f"{at}.out", out)


def _qkv(at: str, q: Any, k: Any, v: Any, order: Tensor) -> Weights:
    return {
        f"{at}.weight": torch.cat([q.weight[order], k.weight[order], v.weight]),
        f"{at}.bias": torch.cat([q.bias[order], k.bias[order], v.bias]),
    }


def _scales(name: str, q: Any, k: Any, order: Tensor) -> Weights:
    """Scales of normalised queries and keys, (2, 1, K), or nothing."""
    if q is None:
        return {}
    within = order[: len(q.weight)]  # the first head's
    return {name: torch.stack([q.weight[within], k.weight[within]])[:, None]}


def _joint_modulations(model: Any) -> list[Any]:
    """Of the image, then of the text, block by block."""
    return [
        norm.linear
        for block in model.transformer_blocks
        for norm in (block.norm1, block.norm1_context)
    ]


def _modulation(straight: list[Any], swapped: list[Any]) -> Weights:
    """All modulations as one layer; those `swapped`, at the end, have scale before shift."""
    weights = _named("modulation", *straight)
    for linear in swapped:
        for name, value in _named("modulation", linear).items():
            weights[name] = torch.cat([weights[name], *reversed(value.chunk(2))])
    return weights


def _final(linear: Any, patch_size: int, channels: int) -> Weights:
    """The output layer with its rows as (c, p, q), of the first `channels` only."""
    return {
        f"final.{name}": value.unflatten(0, (patch_size, patch_size, -1))
        .movedim(2, 0)[:channels]
        .flatten(0, 2)
        for name, value in (("weight", linear.weight), ("bias", linear.bias))
    }


def _loaded(network: Any, weights: Weights) -> Any:
    network.load_state_dict({name: value.detach().clone() for name, value in weights.items()})
    return network.eval()
