"""A diffusers transformer or U-Net, with its published weights, as a network here.

network = load_diffusers("stable-diffusion-3.5-large/transformer")
x0 = sample_euler(network.denoiser(), noise, linear_grid(28, shift=3.0), captions)
network.save("fine-tuned/transformer")  # diffusers loads it back
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import LabelEmbedding
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm_core.backbones.build import without_weights
from ldm_core.backbones.diffusers_config import scheduler_of
from ldm_core.backbones.diffusers_families import family_of
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Condition, Denoiser
from ldm_core.errors import UserError
from ldm_core.files import exists, join, local_copy

WEIGHTS = "diffusion_pytorch_model.safetensors"


class DiffusersNetwork(nn.Module):
    """(x_t, t, cond) -> the raw prediction of a diffusers model.

    Attributes:
        model: the model itself; it may be trained, compiled, sharded or given adapters.
        process, prediction: how the prediction is to be read.
        channels: of the latents it takes.
        takes_labels: whether a condition is labels (B,) and not captions.
    """

    def __init__(
        self, model: Any, scheduler: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Args:
            model: of a class that `family_of` knows.
            scheduler: content of its `scheduler_config.json`, for models with a table of betas.
            options: of the family's call, such as `guidance` or `frame_rate`.

        Raises:
            UserError: a class, table or prediction that is not known here.
        """
        super().__init__()
        self.model, self.options = model, options
        self.family = family_of(model, scheduler or {})
        self.process, self.prediction = self.family.process, self.family.prediction
        self.channels, self.takes_labels = self.family.channels, self.family.takes_labels
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # what is dropped is the training step's to draw

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Predict at time `t`, in the model's dtype.

        Args:
            x_t: (B, C, H, W), or (B, C, T, H, W) for videos.
            t: (B,) in [0, 1], noise at 1.
            cond: B captions, or labels (B,) for DiT.

        Returns:
            The shape and dtype of `x_t`.

        Raises:
            UserError: another number of channels, or a condition that the model cannot take.
        """
        if x_t.shape[1] != self.channels:
            raise UserError(
                f"latents of {x_t.shape[1]} channels for a {type(self.model).__name__} of "
                f"{self.channels}: encode with the autoencoder that it was trained with"
            )
        self._check_condition(cond)
        x, timestep = x_t.to(self.model.dtype), self.family.clock(t)
        return self.family.call(self.model, x, timestep, cond, **self.options).to(x_t.dtype)

    def _check_condition(self, cond: Condition) -> None:
        kind = type(self.model).__name__
        if self.takes_labels and not isinstance(cond, Tensor):
            raise UserError(f"{kind} takes labels (B,), got a {type(cond).__name__}: give classes")
        if not self.takes_labels and not isinstance(cond, TextCondition):
            raise UserError(f"{kind} takes captions, got a {type(cond).__name__}: embed captions")

    def denoiser(self) -> Denoiser:
        """What objectives, guidance and samplers take."""
        return Denoiser(self, self.process, self.prediction)

    def save(self, folder: str | Path) -> None:
        """Write config.json and safetensors as diffusers' own `save_pretrained`."""
        self.model.save_pretrained(folder, safe_serialization=True)


def load_diffusers(
    uri: str,
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] | None = None,
    **options: Any,
) -> DiffusersNetwork:
    """A network from a folder in diffusers' layout, in eval mode.

    Args:
        uri: folder with config.json and *.safetensors, such as a pipeline's `transformer`.
        dtype: of the weights; None leaves them as they are stored.
        scheduler: content of `scheduler_config.json`; None reads the one in the folder `scheduler`
            beside this one, or in this one, if it is there.
        options: of the family's call, such as `guidance` or `frame_rate`.

    Raises:
        UserError: nothing there, not a model that is known here, pickled weights, or others than
            its config.json describes.
    """
    if not exists(join(uri, "config.json")):
        raise UserError(
            f"no model at {uri} (no config.json there); expected a folder that a diffusers model's "
            "save_pretrained wrote, such as a pipeline's transformer or unet"
        )
    if scheduler is None:
        scheduler = scheduler_of(uri)
    with local_copy(uri) as folder:
        model = _load_model(folder, uri)
    if dtype is not None:
        _cast(model, dtype)
    return DiffusersNetwork(model, scheduler, **options).eval()


def _load_model(folder: Path, uri: str) -> nn.Module:
    name = json.loads((folder / "config.json").read_text()).get("_class_name", "")
    kind = getattr(diffusers, name, None) if name.endswith("Model") else None
    if kind is None:
        raise UserError(f"{uri} holds {name or 'a model of no class'}, not a model of diffusers")
    files = _files(folder, uri)
    with without_weights():
        model: nn.Module = kind.from_config(kind.load_config(folder))
    weights = {key: value for file in files for key, value in load_file(file).items()}
    spare = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    try:  # diffusers' own loading of some classes needs another package
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the weights at {uri} are not those of config.json: {reason}") from error
    unexpected = [key for key in unexpected if not any(part in key for part in spare)]
    if missing or unexpected:
        raise UserError(
            f"the weights at {uri} are not those of config.json: {len(missing)} are missing "
            f"and {len(unexpected)} have no place, such as {[*missing, *unexpected][0]}"
        )
    return model


def _files(folder: Path, uri: str) -> list[Path]:
    """The weights' files: one, or those that the index of shards names."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.exists():
        return [folder / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    if not (folder / WEIGHTS).exists():
        raise UserError(
            f"{uri} has no {WEIGHTS}, and pickled weights are never loaded; where you trust them, "
            "load them with diffusers and save_pretrained() to a new folder"
        )
    return [folder / WEIGHTS]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights, but for those that the model's class wants in float32."""
    exact = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if exact.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
