"""Weights out of checkpoints into models others can load, and out of models into a new run.

```
found = newest(root)
export_model(found, "runs/mine/teacher", config, card, average="ema")
export_diffusers(found, network_config, "runs/mine/transformer")
```
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from pydantic import BaseModel
from torch import Tensor, nn

from ldm_core.backbones.class_dit import ClassDiT
from ldm_core.backbones.diffusers_adapter import load_diffusers
from ldm_core.backbones.diffusers_config import (
    SCHEDULER,
    DiffusersConfig,
    read_diffusers_config,
)
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.backbones.diffusers_layout import to_diffusers
from ldm_core.backbones.diffusers_weights import class_dit_from, mmdit_from_flux, mmdit_from_sd3
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.files import absolute, exists, is_remote, join, read_json, upload_folder, write_json
from ldm_core.model_directory import ModelConfig, load_model, save_model
from ldm_core.training.checkpoint_folder import Checkpoint
from ldm_core.training.checkpoint_state import AVERAGE, MODEL
from ldm_core.training.checkpoint_tensors import read_tensors


def trained_weights(checkpoint: Checkpoint, average: str | None = None) -> dict[str, Tensor]:
    """The network's weights in a checkpoint of any layout, whole and in host memory.

    Args:
        checkpoint: a sound one.
        average: name of one that the run kept; None takes the master weights.

    Raises:
        UserError: no such average in it.
    """
    if average is None:
        return read_tensors(checkpoint, MODEL)
    kept = sorted(checkpoint.state.get("averages", {}))
    if average not in kept:
        raise UserError(
            f"{checkpoint.uri} holds no average {average!r}: choose one of {', '.join(kept)}, or "
            "None for the weights themselves"
        )
    return read_tensors(checkpoint, f"{AVERAGE}{average}/")


def export_model(
    checkpoint: Checkpoint, uri: str, config: ModelConfig, card: str, average: str | None = None
) -> str:
    """Write a model directory of a checkpoint's weights; returns the model's digest.

    Raises:
        UserError: no such average, or the checkpoint is of another network than `config`.
    """
    weights = trained_weights(checkpoint, average)
    trained = {name: checkpoint.manifest.architecture.get(name) for name in _plain(config.backbone)}
    if differing := _differences(trained, _plain(config.backbone)):
        raise UserError(
            f"{checkpoint.uri} is of another network than the model's configuration ({differing}):"
            " give the configuration that it was trained with"
        )
    return save_model(uri, config, weights, card)


def export_diffusers(
    checkpoint: Checkpoint, config: BaseModel, uri: str, average: str | None = None
) -> None:
    """Write a checkpoint's weights as a diffusers transformer, config.json and safetensors.

    Raises:
        UserError: no such average, or diffusers has no class that computes what the network does.
    """
    check_exported(config)
    save_diffusers(config, trained_weights(checkpoint, average), uri)


def save_diffusers(config: BaseModel, weights: Mapping[str, Tensor], uri: str) -> str:
    """Write a network's weights as a diffusers transformer; returns the name of its class there.

    Args:
        config: of the network.
        weights: its state, by name.
        uri: local folder or remote prefix.

    Raises:
        UserError: diffusers has no class that computes what the network does.
    """
    check_exported(config)
    model = _of_diffusers(config, weights)
    if not is_remote(uri):
        model.save_pretrained(absolute(uri))
    else:
        with tempfile.TemporaryDirectory(prefix="ldm-") as folder:
            model.save_pretrained(folder)
            upload_folder(folder, uri)
    if isinstance(config, DiffusersConfig) and config.scheduler:
        write_json(join(uri, SCHEDULER), config.scheduler)  # what it predicts is said there
    return type(model).__name__


def _of_diffusers(config: BaseModel, weights: Mapping[str, Tensor]) -> Any:
    """The module of diffusers that a network is, or can be turned into."""
    if isinstance(config, DiffusersConfig):
        network = DiffusersFlow(config)
        network.load_state_dict(weights)
        return network.model
    assert isinstance(config, MMDiTConfig)
    return to_diffusers(config, weights)


def check_exported(config: BaseModel) -> None:
    """Refuse a network that is no model of diffusers'.

    Raises:
        UserError: it is a DiT.
    """
    if isinstance(config, MMDiTConfig | DiffusersConfig):
        return
    kind = type(config).__name__.removesuffix("Config")
    raise UserError(
        f"a {kind} is no model of diffusers': export a model directory, or train an MMDiT, "
        "which is a Stable Diffusion 3 or a Flux there"
    )


@dataclass(frozen=True)
class Initial:
    """Weights a run may begin with, by name, and the network they are of."""

    uri: str
    config: BaseModel
    weights: dict[str, Tensor]

    def load_into(self, network: nn.Module) -> None:
        """Give a network these weights, before it is sharded; it may have been built without any.

        Raises:
            UserError: it is another network; its latents may be of another size.
        """
        mine = network.config
        assert isinstance(mine, BaseModel)
        theirs = type(self.config).__name__
        if type(mine) is not type(self.config):
            raise UserError(
                f"{self.uri} is of a {theirs.removesuffix('Config')}, this run trains a "
                f"{type(network).__name__}: choose that backbone, or other weights to begin with"
            )
        if differing := _differences(_plain(self.config), _plain(mine)):
            raise UserError(
                f"{self.uri} does not fit this run's network ({differing}): set these as they are "
                "there, or begin with other weights"
            )
        if not any(weight.is_meta for weight in network.parameters()):
            network.load_state_dict(self.weights)
        else:  # built without weights: these become its own, in float32
            exact = {name: weight.float() for name, weight in self.weights.items()}
            network.load_state_dict(exact, assign=True)


def initial_weights(uri: str, as_it_is: bool = False) -> Initial:
    """Weights of a model directory, or of a diffusers transformer.

    Args:
        uri: of its folder.
        as_it_is: whether a diffusers transformer is to be trained itself, as a `DiffusersFlow`;
            else it is turned into the network here that it is: DiT into a ClassDiT, Stable
            Diffusion 3 and Flux without guidance embedding into an MMDiT.

    Raises:
        UserError: nothing there, or a model that can only be trained as it is, or not at all.
    """
    config_file = join(uri, "config.json")
    if exists(config_file) and "_class_name" in read_json(config_file):
        if as_it_is:
            known = read_diffusers_config(uri)
            return Initial(uri, known, load_diffusers(uri).model.state_dict())
        network = _converted(uri)
        return Initial(uri, network.config, network.state_dict())
    config, dit, _ = load_model(uri)
    return Initial(uri, config.backbone, dit.state_dict())


def _converted(uri: str) -> MMDiT | ClassDiT:
    model = load_diffusers(uri, torch.float32).model
    try:
        match model:
            case SD3Transformer2DModel():
                return mmdit_from_sd3(model)
            case FluxTransformer2DModel():
                return mmdit_from_flux(model)
            case DiTTransformer2DModel():
                return class_dit_from(model)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{uri}: {error}") from error
    raise UserError(
        f"{uri} is a {type(model).__name__}, which none of the networks here computes: train the "
        "model itself, with train.backbone=diffusers or through load_diffusers"
    )


def _plain(config: BaseModel) -> dict[str, object]:
    """What decides about the weights: not the size of the latents."""
    return config.model_dump(mode="json", exclude={"latent_size"})


def _differences(theirs: Mapping[str, object], mine: Mapping[str, object]) -> str:
    names = [name for name in mine if theirs.get(name) != mine[name]]
    return ", ".join(f"{name} {theirs.get(name)} there, {mine[name]} here" for name in names)
