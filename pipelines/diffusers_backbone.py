"""The transformer of diffusers that a training begins with and trains: `train.backbone=diffusers`.

Its folder says what it is. The recipe says nothing of its shape, and what does not go together is
refused before any worker starts.
"""

from typing import Any

from ldm_core.backbones.diffusers_config import DiffusersConfig, read_diffusers_config
from ldm_core.errors import UserError
from ldm_core.model_directory import read_config
from pipelines.model_uri import model_uri
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection
from pipelines.train_inputs import diffusers_config

LatentShape = tuple[int, ...]  # (C, h, w), or (C, T, h, w) of videos


def initial_backbone(section: TrainSection) -> DiffusersConfig:
    """What the section's initial model is: the folder of a diffusers transformer, or the model
    directory of one that was trained here.

    Raises:
        UserError: nothing there, or a model that is not trained as it is.
    """
    assert section.initial is not None, "the section refuses it"
    uri = model_uri(section.initial)
    named = f"train.initial {uri}"
    if diffusers_config(uri):
        return read_diffusers_config(uri, named)
    config = read_config(uri).backbone
    if not isinstance(config, DiffusersConfig):
        kind = type(config).__name__.removesuffix("Config")
        raise UserError(
            f"{named} is a {kind} and no transformer of diffusers: set train.backbone="
            f"{kind.lower()}, and the train section to the model's"
        )
    return config


def with_initial_sizes(recipe: Recipe) -> Recipe:
    """The recipe of a diffusers transformer with that one's patch size, by which tokens are
    counted, and with one head, as they are dealt out to nobody; others stay as they are.

    Raises:
        UserError: see `initial_backbone`.
    """
    if recipe.train.backbone != "diffusers":
        return recipe
    update: dict[str, Any] = {"patch_size": initial_backbone(recipe.train).patch_size, "heads": 1}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=update)})


def checked(
    section: TrainSection,
    config: DiffusersConfig,
    latent: LatentShape,
    text_width: int,
    pooled_width: int,
) -> DiffusersConfig:
    """The config, if it goes with latents (C, h, w) or (C, T, h, w) and embeddings of these widths.

    Raises:
        UserError: it reads others.
    """
    name, facts = f"train.initial {section.initial} is a {config.class_name}", config.facts
    if latent[0] != facts.channels:
        raise UserError(
            f"{name} of latents of {facts.channels} channels, the store's have {latent[0]}: encode "
            "with the autoencoder it was trained with"
        )
    if text_width != facts.text_width:
        raise UserError(
            f"{name} of captions of width {facts.text_width}, the store's tokens have "
            f"{text_width}: set text.t5 to the text encoder it was trained with, and encode"
        )
    if facts.pooled_width and pooled_width != facts.pooled_width:
        raise UserError(
            f"{name} of pooled captions of width {facts.pooled_width}, the store's have "
            f"{pooled_width}: set text.clip to the one it was trained with, and encode"
        )
    _check_grid(name, config, latent)
    return config


def _check_grid(name: str, config: DiffusersConfig, latent: LatentShape) -> None:
    frames, height, width = latent[1:] if len(latent) == 4 else (1, *latent[1:])
    facts = config.facts
    if frames > 1 and not facts.videos:
        raise UserError(
            f"{name} of pictures, but there are latents of {frames} frames: begin with a model of "
            "videos, or leave the videos out"
        )
    depth, rows, columns = facts.patch
    if depth != 1 or rows != columns:
        raise UserError(f"{name} with patches of {facts.patch}: only squares of one frame are read")
    if height % rows or width % columns:
        raise UserError(
            f"{name} with patches of {rows}, which latents of {height} x {width} are no multiple "
            "of: encode buckets of another size"
        )
    grid = (frames, height // rows, width // columns)
    if facts.grid and any(n > most for n, most in zip(grid, facts.grid, strict=True)):
        raise UserError(
            f"{name} of at most {facts.grid} tokens along frames, rows and columns, and there are "
            f"latents of {grid}: encode smaller buckets or shorter clips"
        )


def check_captions(section: TrainSection, config: DiffusersConfig, longest: int) -> None:
    """Refuse captions that are longer than the model takes.

    Raises:
        UserError: they are.
    """
    most = config.facts.max_tokens
    if most is not None and longest > most:
        raise UserError(
            f"train.initial {section.initial} is a {config.class_name} of at most {most} tokens of "
            f"caption, the store's have up to {longest}: set text.max_tokens={most} and encode"
        )
