"""What training refuses at the door: stores and models that do not go together."""

from typing import Any

from ldm_core.errors import UserError
from ldm_core.files import exists, join, read_json
from ldm_core.latents.manifest import Manifest
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.model_directory import read_config
from pipelines.backbones import BackboneConfig, declared_space, stored_space
from pipelines.model_uri import model_uri
from pipelines.recipes.schema import Recipe
from pipelines.train_plan import TrainingPlan, plan_training


def check_training(recipe: Recipe, version: StoreVersion) -> TrainingPlan:
    """Whether the recipe can be trained on this version of its store; returns the plan.

    Raises:
        UserError: the store holds other sizes or videos of another kind than the transformer takes;
            further stores or the initial model have other encoders, or that has another shape.
    """
    check_buckets(recipe, version)
    for share in recipe.train.mix:
        check_same_encoders(version, LatentStore(share.uri).open_version(share.version))
    plan = plan_training(recipe, stored_space(version))
    if recipe.train.initial:
        check_initial(recipe.train.initial, version.manifest, plan.backbone)
    return plan


def check_buckets(recipe: Recipe, version: StoreVersion) -> None:
    """Refuse a store without a sample of the sizes that the recipe is for.

    Raises:
        UserError: none of them.
    """
    wanted, held = list(declared_space(recipe).latents), version.manifest.buckets
    if not set(wanted) & set(held):
        said = "train.buckets are" if recipe.train.buckets else "size is"
        what = ", ".join(wanted) if recipe.train.buckets else recipe.size
        raise UserError(
            f"{said} {what}, but {version.store.uri} version {version.number} holds "
            f"pictures of {', '.join(held)} (height x width x frames): run "
            "`ldm encode` at this size, or set size to the store's"
        )


def check_same_encoders(first: StoreVersion, other: StoreVersion) -> None:
    """Refuse to mix latents or captions of different encoders.

    Raises:
        UserError: one differs.
    """
    there = _digests(other.manifest)
    for name, digest in _digests(first.manifest).items():
        if there.get(name) != digest:
            raise UserError(
                f"{first.store.uri} has {name} {digest}, {other.store.uri} has {name} "
                f"{there.get(name)}: encode both with the same encoder, or leave it out of "
                "train.mix"
            )


def check_initial(uri: str, manifest: Manifest, backbone: BackboneConfig) -> None:
    """Refuse to start from a model of other latents, captions or another architecture.

    Raises:
        UserError: one differs, or there is no model.
    """
    uri = model_uri(uri)
    written = read_json(join(uri, "config.json")) if exists(join(uri, "config.json")) else {}
    if "_class_name" in written:
        _check_diffusers(uri, written, manifest)
        return
    config = read_config(uri)
    for name, digest in _digests(manifest).items():
        known = getattr(config, name).digest
        if known != digest:
            raise UserError(
                f"train.initial {uri} was trained with {name} {known}, the store's is {digest}: "
                "encode with that one, or start from another model"
            )
    _check_shape(uri, config.backbone, backbone)


def _check_shape(uri: str, known: BackboneConfig, wanted: BackboneConfig) -> None:
    """Of the network, but for the size of its latents, which may grow."""
    mine, theirs = (each.model_dump(exclude={"latent_size"}) for each in (wanted, known))
    names = [name for name in mine if mine[name] != theirs.get(name)]
    if type(known) is not type(wanted) or names:
        told = ", ".join(f"{name} {theirs.get(name)} and not {mine[name]}" for name in names[:4])
        raise UserError(
            f"train.initial {uri} is a {_name(known)} where the recipe says {_name(wanted)}"
            f"{': it has ' + told if told else ''}; set the recipe's train section to the model's"
        )


def _check_diffusers(uri: str, written: dict[str, Any], manifest: Manifest) -> None:
    packed = 4 if written["_class_name"].startswith("Flux") else 1
    channels = written.get("in_channels", 0) // packed
    if channels != manifest.channels:
        raise UserError(
            f"train.initial {uri} is a {written['_class_name']} of latents of {channels} channels, "
            f"the store's have {manifest.channels}: encode with the autoencoder it was trained with"
        )


def _name(config: BackboneConfig) -> str:
    return type(config).__name__.removesuffix("Config")


def _digests(manifest: Manifest) -> dict[str, str]:
    texts = {entry.name: entry.digest for entry in manifest.texts}
    return {"autoencoder": manifest.autoencoder.digest, **texts}
