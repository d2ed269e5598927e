"""A model as a folder: `config.json`, `model.safetensors`, `README.md`; never pickle.

It says everything sampling needs. The autoencoder and text encoders are named by URI and digest,
not copied: they are shared by many models and may be large. A URI beside the model is kept relative
to it, so that a project folder or bucket prefix can be moved as a whole.
"""

import hashlib
import json
import os
from typing import Annotated, Any, Final, Literal

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError
from torch import Tensor

from ldm_core.backbones.build import Backbone as Network
from ldm_core.backbones.build import new_backbone
from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.backbones.dit import DiTConfig
from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.files import (
    absolute,
    exists,
    is_remote,
    join,
    read_bytes,
    read_json,
    remove,
    write_bytes,
)

FORMAT: Final = 3  # 3: layer norm in the transformer; 2: its convolutions
WEIGHTS = "model.safetensors"
_ADDED = {"frame_pairs": 0, "qk_norm": True}  # later, to DiTs: with these one is what it was


def _kind(backbone: Any) -> str:
    """Which of them it is, by a field that it alone has: an MMDiT is for latents of any size."""
    fields = backbone if isinstance(backbone, dict) else type(backbone).model_fields
    return next((kind for field, kind in _KINDS.items() if field in fields), "mmdit")


_KINDS = {"latent_size": "dit", "transformer": "diffusers"}
Backbone = Annotated[
    Annotated[DiTConfig, Tag("dit")]
    | Annotated[MMDiTConfig, Tag("mmdit")]
    | Annotated[DiffusersConfig, Tag("diffusers")],
    Discriminator(_kind),
]


class Reference(BaseModel):
    """Another product this model works with: where it is and which weights are meant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    digest: str


class ModelConfig(BaseModel):
    """What `config.json` holds.

    Attributes:
        kind: "teacher" predicts the velocity; "student" is a flow map with guidance folded in.
        process, prediction: how the network's output is to be read.
        latents_mean, latents_std: per channel; latents are normalised with them.
        sizes: pictures it was trained on, "HxW" in pixels.
        max_tokens: caption limit of the text encoders.
        steps, guidance: defaults for sampling.
        lineage: run id, store version, teacher, …
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[3] = FORMAT
    kind: Literal["teacher", "student"]
    backbone: Backbone
    process: Literal["flow"] = "flow"
    prediction: Literal["velocity"] = "velocity"
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    sizes: tuple[str, ...]
    autoencoder: Reference
    t5: Reference
    clip: Reference
    max_tokens: int
    steps: int
    guidance: float
    lineage: dict[str, str] = {}


def save_model(uri: str, config: ModelConfig, weights: dict[str, Tensor], card: str) -> str:
    """Write a model directory, `config.json` last; returns the model's digest.

    Args:
        uri: local folder or remote prefix.
        config: its references may be absolute; they are stored relative where that is possible.
        weights: the network's state, by name.
        card: text of `README.md`.
    """
    data = safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})
    stored = {
        name: Reference(uri=_relative(ref.uri, uri), digest=ref.digest)
        for name in ("autoencoder", "t5", "clip")
        for ref in [getattr(config, name)]
    }
    config = config.model_copy(update=stored)
    remove(join(uri, "config.json"))  # no old word stands beside new weights
    write_bytes(join(uri, WEIGHTS), data)
    write_bytes(join(uri, "README.md"), card.encode())
    write_bytes(join(uri, "config.json"), (config.model_dump_json(indent=2) + "\n").encode())
    return model_digest(config, data)


def load_model(uri: str) -> tuple[ModelConfig, Network, str]:
    """Read a model directory: (config with absolute references, network in eval mode, digest).

    Raises:
        UserError: nothing there, not a model directory this version can read, or half of one.
    """
    stored = read_config(uri)
    if not exists(join(uri, WEIGHTS)):
        raise UserError(f"{uri}/{WEIGHTS} is missing; copy the model directory as a whole")
    data = read_bytes(join(uri, WEIGHTS))
    network = new_backbone(stored.backbone)
    try:
        network.load_state_dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{uri}/{WEIGHTS} is not what its config.json describes; copy the model directory as a "
            f"whole: {error}"
        ) from error
    resolved = {
        name: Reference(uri=_resolve(ref.uri, uri), digest=ref.digest)
        for name in ("autoencoder", "t5", "clip")
        for ref in [getattr(stored, name)]
    }
    return stored.model_copy(update=resolved), network.eval(), model_digest(stored, data)


def read_config(uri: str) -> ModelConfig:
    """The model's `config.json` as it is stored, with relative references.

    Raises:
        UserError: nothing there, or not a model directory this version can read.
    """
    if not exists(join(uri, "config.json")):
        raise UserError(
            f"no model at {uri} (no config.json there); train one with `ldm train` or `ldm "
            "distill`, or name an existing model directory"
        )
    try:
        written = read_json(join(uri, "config.json"))
    except json.JSONDecodeError as error:
        raise UserError(f"{uri}/config.json is not JSON ({error}); copy it again") from error
    known = written if isinstance(written, dict) else {}
    if "kind" not in known:
        made_for = f", but of class {known['_class_name']}" if "_class_name" in known else ""
        raise UserError(
            f"{uri}/config.json is not of a teacher or student{made_for}: name the folder of one, "
            "such as those `ldm train` and `ldm distill` write"
        )
    former = known.get("format")
    if isinstance(former, int) and 0 < former < FORMAT:
        raise UserError(
            f"{uri} is a model in format {former}, this program reads {FORMAT}: train it again"
        )
    try:
        return ModelConfig.model_validate(written)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError(
            f"{uri}/config.json is damaged or of another version of this program: "
            + "; ".join(faults[:3])
        ) from error


def model_digest(config: ModelConfig, weights: bytes) -> str:
    """16 hex digits over weights and configuration; where the model lies does not count."""
    meaning = config.model_dump(mode="json", exclude={"lineage"})
    if isinstance(config.backbone, DiTConfig):
        for name, former in _ADDED.items():
            if meaning["backbone"][name] == former:
                del meaning["backbone"][name]
    for name in ("autoencoder", "t5", "clip"):
        meaning[name] = meaning[name]["digest"]
    text = json.dumps(meaning, sort_keys=True) + hashlib.sha256(weights).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _relative(uri: str, base: str) -> str:
    """`uri` as seen from the folder `base`, if it lies under the same parent; else absolute."""
    if uri == "identity":
        return uri
    uri, base = absolute(uri), absolute(base)
    parent = base.rstrip("/").rsplit("/", 1)[0] + "/"
    if parent == "/" or parent.endswith("://") or not uri.startswith(parent):
        return uri
    return os.path.relpath(uri, base)


def _resolve(uri: str, base: str) -> str:
    if uri == "identity" or is_remote(uri) or os.path.isabs(uri):
        return uri
    if not is_remote(base):
        return os.path.normpath(os.path.join(absolute(base), uri))
    scheme, path = base.split("://", 1)
    return f"{scheme}://{os.path.normpath(os.path.join(path, uri))}"
