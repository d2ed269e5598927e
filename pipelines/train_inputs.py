"""What a training reads, resolved once by the driver: stores' versions, and the initial model.

Names such as `models:/…@champion` and "the newest version" mean other things an hour later. Workers
that begin again are to read what those before them did.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_core.errors import UserError
from ldm_core.files import (
    exists,
    filesystem,
    folder_digest,
    join,
    local_copy,
    read_bytes,
    read_json,
)
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.model_directory import WEIGHTS, ModelConfig, model_digest, read_config
from pipelines.model_uri import model_uri
from pipelines.recipes.schema import Recipe


@dataclass(frozen=True)
class InitialModel:
    """What a training begins with.

    Attributes:
        digest: of weights and configuration.
        config: of a model directory; None of a diffusers transformer, which says nothing of the
            latents it was trained on: there the stores' statistics normalise them, which are those
            of the same autoencoder, and close to what it is used to as far as the data is.
        look: of its files, as `look_of` sees them.
    """

    uri: str
    digest: str
    config: ModelConfig | None
    look: str = field(default="", compare=False)

    @property
    def run(self) -> str | None:
        """The run that trained it, if it says so."""
        return self.config.lineage.get("run") if self.config else None


def pinned(recipe: Recipe) -> tuple[Recipe, tuple[StoreVersion, ...]]:
    """The recipe with its initial model's folder and the versions of the stores that are mixed in,
    and these versions.

    Raises:
        UserError: a store or version that is not there, or a name that no registry knows.
    """
    section = recipe.train
    versions = mixed_versions(recipe)
    shares = zip(section.mix, versions, strict=True)
    update = {
        "initial": section.initial and model_uri(section.initial),
        "mix": tuple(
            share.model_copy(update={"version": version.number}) for share, version in shares
        ),
    }
    train = section.model_copy(update=update)
    return recipe.model_copy(update={"train": train}), versions


def mixed_versions(recipe: Recipe) -> tuple[StoreVersion, ...]:
    """The versions of the stores that are mixed in."""
    mix = recipe.located().train.mix
    return tuple(LatentStore(share.uri).open_version(share.version) for share in mix)


def input_digests(
    version: StoreVersion, mix: Sequence[StoreVersion], initial: InitialModel | None
) -> dict[str, str]:
    """Of what decides the result besides the recipe, by name."""
    stores = {f"mix.{k}": each.manifest.content[:16] for k, each in enumerate(mix, 1)}
    model = {"initial": initial.digest} if initial else {}
    return {"latents": version.manifest.content[:16], **stores, **model}


def initial_model(uri: str, known: Mapping[str, str] = {}) -> InitialModel:
    """Look at a model directory or a diffusers transformer; reads the weights, unless they are
    known.

    Args:
        uri: of its folder.
        known: digests of models, by the look of their files.

    Raises:
        UserError: no model, or half of one.
    """
    diffusers, look = diffusers_config(uri), look_of(uri)
    config = None if diffusers else read_config(uri)
    digest = known.get(look) or _weights_digest(uri, config)
    return InitialModel(uri, digest, config, look)


def _weights_digest(uri: str, config: ModelConfig | None) -> str:
    if config is None:
        with local_copy(uri) as folder:
            return transformer_digest(folder)
    if not exists(join(uri, WEIGHTS)):
        raise UserError(f"{uri}/{WEIGHTS} is missing; copy the model directory as a whole")
    return model_digest(config, read_bytes(join(uri, WEIGHTS)))


def look_of(uri: str) -> str:
    """16 hex digits of what a storage lists of a folder's files: names, sizes, ETags, when they
    were written. Where it is the same, so is the content.
    """
    fs, path = filesystem(uri)
    files = fs.find(path, detail=True)
    listed = {name: sorted((key, str(it)) for key, it in files[name].items()) for name in files}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:16]


def initial_statistics(uri: str | None) -> LatentStatistics | None:
    """By which the latents of an initial model were normalised, so that its weights go on seeing
    what they are used to; None if it does not say.
    """
    if uri is None or diffusers_config(uri):
        return None
    config = read_config(uri)
    return LatentStatistics(mean=config.latents_mean, std=config.latents_std)


def diffusers_config(uri: str) -> Mapping[str, Any]:
    """`config.json` of a diffusers transformer; empty of a model directory, or of nothing."""
    at = join(uri, "config.json")
    try:
        written = read_json(at) if exists(at) else {}
    except json.JSONDecodeError:
        return {}  # whoever reads it as a model directory's says so
    return written if isinstance(written, dict) and "_class_name" in written else {}


def transformer_digest(folder: Path) -> str:
    """16 hex digits over weights and configuration of a diffusers transformer."""
    config = json.loads((folder / "config.json").read_text())
    for key in ("_diffusers_version", "_name_or_path"):
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True) + folder_digest(folder, ".safetensors")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
