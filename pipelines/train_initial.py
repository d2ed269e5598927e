"""Whether an initial model goes with a training's latents, captions and network."""

import os
from collections.abc import Mapping
from typing import Any

from ldm_core.backbones.diffusers_config import DiffusersConfig, trained_as_it_is
from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.files import absolute, is_remote
from ldm_core.latents.manifest import Manifest
from ldm_core.model_directory import read_config
from pipelines.backbones import BackboneConfig
from pipelines.train_inputs import diffusers_config, initial_model


def check_initial(uri: str, manifest: Manifest, backbone: BackboneConfig) -> None:
    """Refuse to start from a model of other latents, captions or another architecture.

    Of a diffusers transformer its config.json is compared; how it was trained is not told there.

    Raises:
        UserError: one differs, or there is no model.
    """
    written = diffusers_config(uri)
    if written and isinstance(backbone, DiffusersConfig):
        return  # which was read from there, and compared with the latents
    if written:
        _check_diffusers(uri, written, manifest, backbone)
        return
    config = read_config(uri)
    for name, digest in encoder_digests(manifest).items():
        known = getattr(config, name).digest
        if known != digest:
            raise UserError(
                f"train.initial {uri} was trained with {name} {known}, the store's is {digest}: "
                "encode with that one, or start from another model"
            )
    theirs = config.backbone.model_dump(exclude={"latent_size"})
    _check_shape(uri, _name(config.backbone), theirs, backbone)


def check_not_overwritten(uri: str, product: str) -> None:
    """Refuse to start from the folder that the training writes its own model to: workers that
    begin again read the initial model again.

    Raises:
        UserError: they are one folder.
    """
    if _place(uri) == _place(product):
        raise UserError(
            f"train.initial {uri} is where this training writes its own model: copy it to another "
            "folder and start from that, or train in another root (a model trained with "
            "train.promote=better is kept in a folder of its own when it becomes the champion)"
        )


def check_unchanged(uri: str, digest: str) -> None:
    """Refuse another initial model than the one the training began with.

    Args:
        uri: of its folder.
        digest: that it had then.

    Raises:
        UserError: it has another one now.
    """
    found = initial_model(uri).digest
    if found != digest:
        raise UserError(
            f"train.initial {uri} now holds the model {found}, but this training began with "
            f"{digest}: put that one back, or run the command again to train anew from {found}"
        )


def _place(uri: str) -> str:
    """The same for all names of a folder."""
    return uri.rstrip("/") if is_remote(uri) else os.path.realpath(absolute(uri))


def encoder_digests(manifest: Manifest) -> dict[str, str]:
    """Of what made a store's latents and embeddings, by name."""
    texts = {entry.name: entry.digest for entry in manifest.texts}
    return {"autoencoder": manifest.autoencoder.digest, **texts}


def _check_shape(uri: str, kind: str, theirs: Mapping[str, Any], wanted: BackboneConfig) -> None:
    """Of the network, as far as it is known; the size of its latents may grow."""
    mine = wanted.model_dump(exclude={"latent_size"})
    names = [name for name in mine if name in theirs and mine[name] != theirs[name]]
    if kind != _name(wanted) or names:
        told = ", ".join(f"{name} {theirs[name]} and not {mine[name]}" for name in names[:4])
        raise UserError(
            f"train.initial {uri} is a {kind} where the recipe says {_name(wanted)}"
            f"{': it has ' + told if told else ''}; set the recipe's train section to the model's"
            f"{', train.backbone=diffusers' if kind == 'Diffusers' else ''}"
        )


def _check_diffusers(
    uri: str, written: Mapping[str, Any], manifest: Manifest, backbone: BackboneConfig
) -> None:
    kind = str(written["_class_name"])
    architecture = _ARCHITECTURES.get(kind)
    if architecture is None:
        remedy = f"begins with one of {', '.join(_ARCHITECTURES)}, or with a model directory"
        if trained_as_it_is(kind):
            remedy = "of one of diffusers' own models is asked for with train.backbone=diffusers"
        raise UserError(f"train.initial {uri} is a {kind}: a training {remedy}")
    theirs = {name: value for name, value in architecture(written).items() if value is not None}
    if theirs.get("in_channels") != manifest.channels:
        raise UserError(
            f"train.initial {uri} is a {kind} of latents of {theirs.get('in_channels')} channels, "
            f"the store's have {manifest.channels}: encode with the autoencoder it was trained with"
        )
    for name in ("dual_attention_layers", "guidance_embeds"):
        if written.get(name):
            raise UserError(
                f"train.initial {uri} has {name} {written[name]}, which no network here has: start "
                f"from a model without{_OR_ITSELF if trained_as_it_is(kind) else ''}"
            )
    _check_shape(uri, "MMDiT", theirs, backbone)
    if "axes_dims_rope" not in written and isinstance(backbone, MMDiTConfig) and backbone.rotary:
        raise UserError(f"train.initial {uri} has fixed positions: set train.positions=fixed")


def _joint(written: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of an MMDiT; None where it is silent."""
    heads, head = written.get("num_attention_heads"), written.get("attention_head_dim")
    return {
        "width": heads * head if heads and head else None,
        "depth": written.get("num_layers"),
        "heads": heads,
        "text_width": written.get("joint_attention_dim"),
        "pooled_width": written.get("pooled_projection_dim"),
    }


def _sd3(written: Mapping[str, Any]) -> dict[str, Any]:
    patch, side = written.get("patch_size"), written.get("sample_size")
    return {
        **_joint(written),
        "in_channels": written.get("in_channels"),
        "patch_size": patch,
        "single_depth": 0,
        "qk_norm": written["qk_norm"] is not None if "qk_norm" in written else None,
        "position_grid": written.get("pos_embed_max_size"),
        "position_span": side // patch if side and patch else None,
    }


def _flux(written: Mapping[str, Any]) -> dict[str, Any]:
    turned = written.get("axes_dims_rope")
    packed = written.get("in_channels")
    return {
        **_joint(written),
        "in_channels": packed // 4 if packed else None,
        "patch_size": 2,
        "single_depth": written.get("num_single_layers"),
        "qk_norm": True,
        "rotary": tuple(turned) if turned else None,
    }


_OR_ITSELF = ", or train diffusers' own with train.backbone=diffusers"
_ARCHITECTURES = {"SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux}


def _name(config: BackboneConfig) -> str:
    return type(config).__name__.removesuffix("Config")
