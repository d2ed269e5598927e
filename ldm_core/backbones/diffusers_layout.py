"""Networks here as diffusers' transformers: the inverse of `diffusers_weights`, bit for bit.

A stacked matrix is cut apart and every change of order undone. An MMDiT with fixed positions is
a Stable Diffusion 3, one with rotary positions and single blocks a Flux.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from ldm_core.backbones.diffusers_weights import Weights, half_apart
from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.errors import UserError

Rows = Callable[[Tensor], Tensor]
Named = Iterator[tuple[str, Tensor]]


def to_diffusers(config: MMDiTConfig, weights: Mapping[str, Tensor]) -> Any:
    """The diffusers model that an MMDiT is; `save_pretrained` writes it.

    Args:
        config: of the MMDiT.
        weights: its state, by name.

    Raises:
        UserError: diffusers has no class that computes this.
    """
    model: Any = _flux(config) if config.rotary else _sd3(config)
    named = _flux_weights if config.rotary else _sd3_weights
    theirs = {
        name: torch.empty(w.shape, dtype=w.dtype).copy_(w) for name, w in named(config, weights)
    }
    missing, unexpected = model.load_state_dict(theirs, strict=False, assign=True)
    assert not unexpected, unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}, missing  # fixed, and not a weight here
    return model.eval()


def _sd3(config: MMDiTConfig) -> SD3Transformer2DModel:
    _check(config, {"single_depth": 0, "mlp_ratio": 4.0})
    return SD3Transformer2DModel(
        sample_size=config.position_span * config.patch_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        num_layers=config.depth,
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        joint_attention_dim=config.text_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        pos_embed_max_size=config.position_grid,
        qk_norm="rms_norm" if config.qk_norm else None,
    )


def _flux(config: MMDiTConfig) -> FluxTransformer2DModel:
    _check(config, {"patch_size": 2, "mlp_ratio": 4.0, "qk_norm": True, "rotary_base": 10_000.0})
    if not config.single_depth:
        raise UserError(
            "an MMDiT with rotary positions and no single blocks is no model of diffusers': its "
            "last block only reads the text; save it as a model directory"
        )
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * config.in_channels,
        num_layers=config.depth,
        num_single_layers=config.single_depth,
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        joint_attention_dim=config.text_width,
        pooled_projection_dim=config.pooled_width,
        axes_dims_rope=config.rotary,
    )


def _check(config: MMDiTConfig, needed: Mapping[str, object]) -> None:
    kind = "Flux" if config.rotary else "Stable Diffusion 3"
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name} is {getattr(config, name)}, and diffusers' {kind} has {value}: save this "
                "MMDiT as a model directory"
            )


def _sd3_weights(config: MMDiTConfig, weights: Mapping[str, Tensor]) -> Named:
    names = list(_joint_norms(config.depth))
    yield from _shared(weights)
    yield from _modulations(config, weights, names, swapped=2)
    patch = weights["patch_embedding.weight"]
    side = config.patch_size
    yield "pos_embed.proj.weight", patch.unflatten(1, (config.in_channels, side, side))
    yield "pos_embed.proj.bias", weights["patch_embedding.bias"]
    for kind in ("weight", "bias"):  # rows (c, p, q) here, (p, q, c) there
        rows = weights[f"final.{kind}"].unflatten(0, (config.in_channels, side, side))
        yield f"proj_out.{kind}", rows.movedim(0, 2).flatten(0, 2)
    for i in range(config.depth):
        at = f"transformer_blocks.{i}"
        yield from _joint_block(at, _within(weights, f"blocks.{i}."), _same)


def _flux_weights(config: MMDiTConfig, weights: Mapping[str, Tensor]) -> Named:
    order = half_apart(config.heads, config.width // config.heads).argsort()
    singles = [f"single_transformer_blocks.{i}" for i in range(config.single_depth)]
    names = [*_joint_norms(config.depth), *(f"{at}.norm" for at in singles)]
    yield from _shared(weights)
    yield from _modulations(config, weights, names, swapped=1)
    yield from _named("x_embedder", _within(weights, "patch_embedding."))
    yield from _named("proj_out", _within(weights, "final."))

    def neighbours(rows: Tensor) -> Tensor:
        return rows[order[: len(rows)]]

    for i in range(config.depth):
        at = f"transformer_blocks.{i}"
        yield from _joint_block(at, _within(weights, f"blocks.{i}."), neighbours)
    for i, at in enumerate(singles):
        yield from _single_block(at, _within(weights, f"single_blocks.{i}."), neighbours)


def _same(rows: Tensor) -> Tensor:
    return rows


def _within(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def _named(at: str, weights: Weights) -> Named:
    for name, value in weights.items():
        yield f"{at}.{name}", value


def _shared(weights: Mapping[str, Tensor]) -> Named:
    """The embeddings of caption and time."""
    yield from _named("context_embedder", _within(weights, "text_embedding."))
    for ours, theirs in (("time_embedding", "timestep"), ("pooled_embedding", "text")):
        at = f"time_text_embed.{theirs}_embedder"
        yield from _named(f"{at}.linear_1", _within(weights, f"{ours}.hidden."))
        yield from _named(f"{at}.linear_2", _within(weights, f"{ours}.out."))


def _joint_norms(depth: int) -> Iterator[str]:
    for i in range(depth):
        yield f"transformer_blocks.{i}.norm1"
        yield f"transformer_blocks.{i}.norm1_context"


def _modulations(
    config: MMDiTConfig, weights: Mapping[str, Tensor], names: list[str], swapped: int
) -> Named:
    """A layer for each norm out of the one for all; the last `swapped` have scale before shift."""
    sizes = [n for rows in config.modulations[: config.depth] for n in (6, rows - 6)]
    sizes += config.modulations[config.depth :]
    for kind in ("weight", "bias"):
        parts = weights[f"modulation.{kind}"].split([n * config.width for n in sizes])
        last = len(parts) - swapped
        for number, (name, part) in enumerate(zip([*names, "norm_out"], parts, strict=True)):
            turned = torch.cat([*reversed(part.chunk(2))]) if number >= last else part
            yield f"{name}.linear.{kind}", turned


def _joint_block(at: str, weights: Weights, order: Rows) -> Named:
    image, text = _within(weights, "image."), _within(weights, "text.")
    attention = f"{at}.attn"
    yield from _qkv(attention, ("to_q", "to_k", "to_v"), image, order)
    yield from _scales(attention, ("norm_q", "norm_k"), image, order)
    yield from _named(f"{attention}.to_out.0", _within(image, "out."))
    yield from _mlp(f"{at}.ff", image)
    if text:
        yield from _qkv(attention, ("add_q_proj", "add_k_proj", "add_v_proj"), text, order)
        yield from _scales(attention, ("norm_added_q", "norm_added_k"), text, order)
        yield from _named(f"{attention}.to_add_out", _within(text, "out."))
        yield from _mlp(f"{at}.ff_context", text)
        return
    yield from _last_text(attention, weights)


def _last_text(attention: str, weights: Weights) -> Named:
    """Keys and values of the text; the queries there are computed, and nobody reads the answer."""
    for kind in ("weight", "bias"):
        keys, values = weights[f"text_kv.{kind}"].chunk(2)
        yield f"{attention}.add_q_proj.{kind}", torch.zeros_like(keys)
        yield f"{attention}.add_k_proj.{kind}", keys
        yield f"{attention}.add_v_proj.{kind}", values
    if "text_scale" in weights:
        yield f"{attention}.norm_added_q.weight", torch.ones_like(weights["text_scale"])
        yield f"{attention}.norm_added_k.weight", weights["text_scale"]


def _single_block(at: str, weights: Weights, order: Rows) -> Named:
    yield from _qkv(f"{at}.attn", ("to_q", "to_k", "to_v"), weights, order)
    yield from _scales(f"{at}.attn", ("norm_q", "norm_k"), weights, order)
    yield from _named(f"{at}.proj_mlp", _within(weights, "mlp.hidden."))
    yield f"{at}.proj_out.weight", torch.cat([weights["out.weight"], weights["mlp.out.weight"]], 1)
    yield f"{at}.proj_out.bias", weights["mlp.out.bias"]


def _qkv(at: str, names: tuple[str, str, str], weights: Weights, order: Rows) -> Named:
    for kind in ("weight", "bias"):
        q, k, v = weights[f"qkv.{kind}"].chunk(3)
        for name, part in zip(names, (order(q), order(k), v), strict=True):
            yield f"{at}.{name}.{kind}", part


def _scales(at: str, names: tuple[str, str], weights: Weights, order: Rows) -> Named:
    if "scale" in weights:
        for name, part in zip(names, weights["scale"][:, 0], strict=True):
            yield f"{at}.{name}.weight", order(part)


def _mlp(at: str, weights: Weights) -> Named:
    yield from _named(f"{at}.net.0.proj", _within(weights, "mlp.hidden."))
    yield from _named(f"{at}.net.2", _within(weights, "mlp.out."))
