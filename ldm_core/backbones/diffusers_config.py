"""What a diffusers transformer is, as far as a training, a plan and a model directory must know.

Its own config.json says it, and the scheduler_config.json beside it: kept whole, so that diffusers
builds the same module from it again. diffusers itself, whose import takes seconds, is needed to
read a folder, and not to read a model directory's config.json.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from ldm_core.errors import UserError
from ldm_core.files import exists, join, read_json

CLASS = "_class_name"
SCHEDULER = "scheduler_config.json"
_OF_ITS_FOLDER = {"_diffusers_version", "_name_or_path"}  # and not of the model
_FURTHER = ("image_dim", "added_kv_proj_dim", "image_condition_type")  # conditions of pictures


@dataclass(frozen=True)
class Facts:
    """What a model reads.

    Attributes:
        channels: of latents.
        patch: frames, rows and columns of latents that become one token.
        text_width: channels of a caption token.
        pooled_width: channels of a pooled caption; 0 if it reads none.
        videos: whether latents have frames.
        max_tokens: the longest caption; None is any.
        grid: the most tokens along frames, rows and columns; None are any.
    """

    channels: int
    patch: tuple[int, int, int]
    text_width: int
    pooled_width: int = 0
    videos: bool = False
    max_tokens: int | None = None
    grid: tuple[int, int, int] | None = None


class DiffusersConfig(BaseModel):
    """A transformer of diffusers that captions condition.

    Attributes:
        transformer: content of its config.json, with every argument of its class.
        scheduler: content of the scheduler_config.json beside it; empty where there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformer: dict[str, Any]
    scheduler: dict[str, Any] = {}

    @field_validator("transformer", "scheduler")
    @classmethod
    def _plain(cls, content: dict[str, Any]) -> dict[str, Any]:
        """As JSON has it: two that are the same are equal."""
        plain: dict[str, Any] = json.loads(json.dumps(content))
        return {key: value for key, value in plain.items() if key not in _OF_ITS_FOLDER}

    @field_validator("transformer")
    @classmethod
    def _known(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Refuse a class without facts; pydantic reports it in a ValidationError."""
        check_class(str(content.get(CLASS)))
        return content

    @property
    def class_name(self) -> str:
        """Of diffusers."""
        return str(self.transformer[CLASS])

    @property
    def facts(self) -> Facts:
        """What it reads.

        Raises:
            UserError: its config.json is incomplete.
        """
        try:
            return _FACTS[self.class_name](self.transformer)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the config.json of this {self.class_name} does not say {error}: save the model "
                "with diffusers' save_pretrained"
            ) from error

    @property
    def in_channels(self) -> int:
        """Of latents."""
        return self.facts.channels

    @property
    def patch_size(self) -> int:
        """Side of the square of latents that becomes one token."""
        return self.facts.patch[-1]

    @property
    def text_width(self) -> int:
        """Channels of a caption token."""
        return self.facts.text_width

    @property
    def pooled_width(self) -> int:
        """Channels of a pooled caption; 0 if it reads none."""
        return self.facts.pooled_width


def read_diffusers_config(uri: str, name: str | None = None) -> DiffusersConfig:
    """Of a folder that `save_pretrained` wrote; arguments it is silent about are the class's.

    Args:
        uri: of the folder.
        name: by which errors call it; None is `uri`.

    Raises:
        UserError: a class that takes no captions or has no call here, or conditions of pictures.
    """
    written = read_json(join(uri, "config.json"))
    name = uri if name is None else name
    try:
        check_class(str(written.get(CLASS)))
    except UserError as error:
        raise UserError(f"{name} is {error}") from error
    for key in _FURTHER:
        if written.get(key):
            raise UserError(
                f"{name} has {key} {written[key]}: it is conditioned on pictures, of which a store "
                "has none; take the model of captions alone"
            )
    return DiffusersConfig(
        transformer={**_defaults(str(written[CLASS])), **written}, scheduler=scheduler_of(uri)
    )


def scheduler_of(uri: str) -> dict[str, Any]:
    """Content of the `scheduler_config.json` of a model: in the folder `scheduler` beside it, as in
    a pipeline, or in its own; empty where there is none.
    """
    beside = join(uri.rstrip("/").rpartition("/")[0] or ".", "scheduler", SCHEDULER)
    for place in (beside, join(uri, SCHEDULER)):
        if exists(place):
            found: dict[str, Any] = read_json(place)
            return found
    return {}


def check_class(name: str) -> None:
    """Refuse a class that is not trained as it is.

    Raises:
        UserError: it is none of those that are.
    """
    if name not in _FACTS:
        raise UserError(
            f"a {name}; of diffusers' classes {', '.join(_FACTS)} are trained as they are"
            f"{_INSTEAD.get(name, '')}"
        )


def trained_as_it_is(name: str) -> bool:
    """Whether `check_class` lets a class of diffusers pass."""
    return name in _FACTS


def _defaults(name: str) -> Mapping[str, Any]:
    """What a class takes where it is told nothing."""
    import diffusers  # here: it takes seconds

    arguments = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {each.name: each.default for each in arguments if each.default is not each.empty}


def _wan(config: Mapping[str, Any]) -> Facts:
    most = config["rope_max_seq_len"]
    patch = config["patch_size"]
    return Facts(
        config["in_channels"], (patch[0], patch[1], patch[2]), config["text_dim"], videos=True,
        max_tokens=512, grid=(most, most, most),
    )  # fmt: skip


def _pixart(config: Mapping[str, Any]) -> Facts:
    patch = config["patch_size"]
    width = config["caption_channels"] or config["cross_attention_dim"]
    return Facts(config["in_channels"], (1, patch, patch), width)


def _hunyuan_video(config: Mapping[str, Any]) -> Facts:
    patch = config["patch_size"]
    return Facts(
        config["in_channels"], (config["patch_size_t"], patch, patch), config["text_embed_dim"],
        config["pooled_projection_dim"], videos=True,
    )  # fmt: skip


def _ltx(config: Mapping[str, Any]) -> Facts:
    patch = config["patch_size"]
    shape = (config["patch_size_t"], patch, patch)
    return Facts(config["in_channels"], shape, config["caption_channels"], videos=True)


def _lumina2(config: Mapping[str, Any]) -> Facts:
    patch, (words, rows, columns) = config["patch_size"], config["axes_lens"]
    return Facts(
        config["in_channels"], (1, patch, patch), config["cap_feat_dim"],
        max_tokens=words - 1, grid=(1, rows, columns),
    )  # fmt: skip


def _flux(config: Mapping[str, Any]) -> Facts:
    packed, pooled = config["in_channels"], config["pooled_projection_dim"]
    return Facts(packed // 4, (1, 2, 2), config["joint_attention_dim"], pooled)


_FACTS: dict[str, Callable[[Mapping[str, Any]], Facts]] = {
    "WanTransformer3DModel": _wan,
    "PixArtTransformer2DModel": _pixart,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "LTXVideoTransformer3DModel": _ltx,
    "Lumina2Transformer2DModel": _lumina2,
    "FluxTransformer2DModel": _flux,
}
_INSTEAD = {
    "SD3Transformer2DModel": (
        ". It reads the padding of captions, of which a store has none: train it as the mmdit that "
        "it is, with train.backbone=mmdit"
    ),
    "DiTTransformer2DModel": ". It takes labels, and a store has captions: begin with another",
}
