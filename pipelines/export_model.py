"""A trained model in another place or layout, perhaps with another average of its weights.

    model directory (+ snapshots of its training) -> diffusers' transformer, or a model directory

Nothing is trained, and what is exported stays as it is.
"""

from typing import Literal

from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.files import exists, is_remote, join, reach, write_bytes
from ldm_core.model_directory import ModelConfig, save_model
from ldm_core.training.power_ema import power_exponent
from pipelines.average_model import Model, averaged, read_model
from pipelines.model_uri import model_uri
from pipelines.teacher_places import ADAPTER

Form = Literal["diffusers", "ldm"]


def export_model(name: str, out: str, length: float | None, form: Form | None) -> list[str]:
    """Write a model to `out`; returns what is to be told of it, a line each.

    Args:
        name: model directory, `s3://` URI, or `models:/name@alias`.
        out: folder or remote prefix, with no model there.
        length: of the average, relative to that of training; None are the model's own weights.
        form: None is diffusers', or a model directory if `length` is given.

    Raises:
        UserError: no such model, nothing that diffusers has a class for, no snapshots of its
            training, or a place that holds a model.
    """
    if length is not None:
        _check_length(length)
    uri = model_uri(name)
    form = form or ("ldm" if length is not None else "diffusers")
    reach(uri)
    model = read_model(uri)
    _check_form(name, model.config, form)
    _check_place(out)
    told: list[str] = []
    if length is not None:
        model, told = averaged(model, length)
    write = {"ldm": _write_ldm, "diffusers": _write_diffusers}[form]
    return [*told, *write(model, out)]


def _check_length(length: float) -> None:
    try:
        power_exponent(length)
    except ValueError as error:
        raise UserError(f"--average {length:g}: {error}") from error


def _check_form(name: str, config: ModelConfig, form: Form) -> None:
    """Here and not after minutes of averaging."""
    if form == "diffusers" and not isinstance(config.backbone, MMDiTConfig | DiffusersConfig):
        kind = type(config.backbone).__name__.removesuffix("Config")
        raise UserError(
            f"{name} is a {kind}, for which diffusers has no class: export it with --to ldm, or "
            "train with --set train.backbone=mmdit, which is a Stable Diffusion 3 or a Flux there"
        )


def _check_place(out: str) -> None:
    reach(out)
    if exists(join(out, "config.json")):
        raise UserError(f"{out} already holds a model: name another place, or remove it")


def _write_ldm(model: Model, out: str) -> list[str]:
    if model.adapters:
        model.adapters.save(join(out, ADAPTER))
    digest = save_model(out, model.config, dict(model.weights), model.card)
    return [
        f"{out}: model {digest}, a {model.config.kind}; config.json, model.safetensors, README.md",
        f"next: ldm sample --model {out} --prompt …",
    ]


def _write_diffusers(model: Model, out: str) -> list[str]:
    from ldm_core.model_export import save_diffusers  # here: diffusers takes seconds

    kind = save_diffusers(model.config.backbone, model.weights, out)
    write_bytes(join(out, "README.md"), _diffusers_card(model, kind).encode())
    load = "diffusers reads a local copy of it" if is_remote(out) else "in Python"
    path = out.removeprefix("file://")  # diffusers knows no URIs
    return [
        f"{out}: {kind} of model {model.digest}; its README.md says how it was trained",
        f"{load}: diffusers.{kind}.from_pretrained({path!r})",
        f"next: ldm train … --set train.initial={out} goes on training it",
    ]


def _diffusers_card(model: Model, kind: str) -> str:
    config = model.config
    as_it_is = isinstance(config.backbone, DiffusersConfig)
    return _CARD.format(
        kind=kind,
        predicts=_AS_IT_IS if as_it_is else _VELOCITY,
        digest=model.digest,
        mean=", ".join(f"{value:g}" for value in config.latents_mean),
        std=", ".join(f"{value:g}" for value in config.latents_std),
        sizes=", ".join(config.sizes),
        **config.model_dump(include={"max_tokens", "steps", "guidance"}),
        autoencoder=f"`{config.autoencoder.uri}` ({config.autoencoder.digest})",
        t5=f"`{config.t5.uri}` ({config.t5.digest})",
        clip=f"`{config.clip.uri}` ({config.clip.digest})",
        of=f"\n\nThe card of that model:\n\n{_without_header(model.card)}" if model.card else "\n",
    )


def _without_header(card: str) -> str:
    """A card without the YAML that hubs read."""
    return card.split("\n---\n", 1)[1] if card.startswith("---\n") else card


_VELOCITY = (
    "velocity eps - x0 of x_t = (1 - t) x0 + t eps, as FlowMatchEulerDiscreteScheduler expects it"
)
_AS_IT_IS = (
    "what it predicts, and of which time, is what this class's own pipeline and the scheduler it "
    "was published with expect"
)
_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# A {kind}

The transformer alone, of model `{digest}` of latent-diffusion-on-ray. What it computes with:

- {predicts}
- latents (z - mean) / std, channel by channel: mean {mean}; std {std}
- autoencoder {autoencoder}
- captions of T5 {t5}, at most {max_tokens} tokens, and pooled of CLIP {clip}
- trained on pictures of {sizes}; default {steps} steps at guidance {guidance}{of}"""
