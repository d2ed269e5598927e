"""What training refuses at the door: stores and models that do not go together."""

from collections.abc import Sequence
from dataclasses import replace

from ldm_core.autoencoders.autoencoder import IdentityAutoencoder, autoencoder_digest
from ldm_core.errors import UserError
from ldm_core.files import local_copy
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.store import StoreVersion
from pipelines.backbones import LatentSpace, declared_space, stored_space
from pipelines.recipes.schema import Recipe
from pipelines.train_initial import check_initial, check_not_overwritten, encoder_digests
from pipelines.train_plan import TrainingPlan, plan_training


def check_training(
    recipe: Recipe, version: StoreVersion, mix: Sequence[StoreVersion]
) -> TrainingPlan:
    """Whether the recipe can be trained on these versions; returns the plan, of all their buckets.

    Args:
        recipe: its initial model is named by folder.
        version: of its own store.
        mix: of the further stores.

    Raises:
        UserError: a store holds other sizes or videos of another kind than the transformer takes;
            further stores or the initial model have other encoders, or that has another shape, or
            lies where the training writes its own.
    """
    if recipe.train.initial:
        check_not_overwritten(recipe.train.initial, recipe.product("teacher"))
    check_buckets(recipe, version)
    check_named_once([version, *mix])
    for other in mix:
        check_same_encoders(version, other)
    plan = plan_training(recipe, mixed_space([version, *mix]))
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


def check_autoencoder(version: StoreVersion) -> None:
    """Refuse latents that nothing decodes: validation and whoever samples load the autoencoder.

    Its weights are read, but not loaded.

    Raises:
        UserError: where the store says it is there is another one, or none.
    """
    entry, store = version.manifest.autoencoder, version.store.uri
    remedy = f"put the former one back, or run `ldm encode` again to make {store} anew"
    try:
        found = _digest_at(entry)
    except FileNotFoundError as error:
        raise UserError(
            f"{store} version {version.number} was encoded by the autoencoder {entry.digest} at "
            f"{entry.uri}, where there is none now ({error}): {remedy}"
        ) from error
    if found != entry.digest:
        raise UserError(
            f"{store} version {version.number} was encoded by the autoencoder {entry.digest}, but "
            f"{entry.uri} now holds {found}: {remedy}"
        )


def _digest_at(entry: EncoderEntry) -> str:
    if entry.uri == "identity":
        return IdentityAutoencoder.digest
    with local_copy(entry.uri) as folder:
        return autoencoder_digest(folder)


def check_named_once(versions: Sequence[StoreVersion]) -> None:
    """Refuse a store that is to be read as two.

    Raises:
        UserError: a URI comes twice.
    """
    uris = [version.store.uri.rstrip("/") for version in versions]
    for uri in uris[1:]:
        if uris.count(uri) > 1:
            raise UserError(
                f"{uri} is named twice, as the recipe's store or in train.mix: name it once, with "
                "the weight of both"
            )


def check_same_encoders(first: StoreVersion, other: StoreVersion) -> None:
    """Refuse to mix latents or captions of different encoders.

    Raises:
        UserError: one differs.
    """
    there = encoder_digests(other.manifest)
    for name, digest in encoder_digests(first.manifest).items():
        if there.get(name) != digest:
            raise UserError(
                f"{first.store.uri} has {name} {digest}, {other.store.uri} has {name} "
                f"{there.get(name)}: encode both with the same encoder, or leave it out of "
                "train.mix"
            )


def mixed_space(versions: Sequence[StoreVersion]) -> LatentSpace:
    """What some stores hold between them, the buckets of the first one first.

    Raises:
        UserError: a bucket's latents are of another shape in one of them.
    """
    first, *others = versions
    space = stored_space(first)
    latents = dict(space.latents)
    for other in others:
        for name, latent in stored_space(other).latents.items():
            if latents.setdefault(name, latent) != latent:
                raise UserError(
                    f"the latents of {name} are {latent} in {other.store.uri} and {latents[name]} "
                    f"in {first.store.uri} or the stores before: encode one of them anew as the "
                    "other was, or leave it out of train.mix"
                )
    longest = max(version.manifest.max_tokens for version in versions)
    return replace(space, latents=latents, max_tokens=longest)
