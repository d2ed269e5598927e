"""`--dry-run`: what a stage would read, make and take. It starts and writes nothing.

Whether it would run at all, the stage itself says: it alone knows what its digest is made of.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm_core.files import exists, join
from pipelines.recipes.schema import Recipe
from pipelines.stage import read_record


@dataclass(frozen=True)
class Stage:
    """What a preview shows of a stage.

    Attributes:
        product: name of the folder it makes under the root.
        inputs: name -> (URI, the file that shows it is there, or "" for the folder itself).
        sections: the recipe's sections it reads.
    """

    product: str
    inputs: Callable[[Recipe], dict[str, tuple[str, str]]]
    sections: tuple[str, ...]


def _of_encode(recipe: Recipe) -> dict[str, tuple[str, str]]:
    auto = recipe.autoencoder_uri
    found = {"data": (recipe.data, "")}
    return found if auto == "identity" else {**found, "autoencoder": (auto, "config.json")}


def _latents(recipe: Recipe) -> dict[str, tuple[str, str]]:
    return {"latents": (recipe.product("latents"), "versions")}


def _model(recipe: Recipe, kind: str) -> dict[str, tuple[str, str]]:
    return {kind: (recipe.product(kind), "config.json")}


STAGES = {
    "autoencoder": Stage("autoencoder", lambda r: {"data": (r.data, "")}, ("autoencoder",)),
    "encode": Stage("latents", _of_encode, ("encode", "text")),
    "train": Stage("teacher", _latents, ("train",)),
    "distill": Stage("student", lambda r: _latents(r) | _model(r, "teacher"), ("distill",)),
    "evaluate": Stage(
        "evaluation", lambda r: _model(r, "teacher") | _model(r, "student"), ("evaluate",)
    ),
}


def preview(name: str, recipe: Recipe) -> None:
    """Print what a stage would read, make and take."""
    stage = STAGES[name]
    for each, (uri, mark) in stage.inputs(recipe).items():
        there = "there" if exists(join(uri, mark) if mark else uri) else "missing"
        print(f"  reads    {each:<12} {uri}  ({there})")
    product = recipe.product(stage.product)
    print(f"  makes    {stage.product:<12} {product}  ({_made(product)})")
    for section in stage.sections:
        settings = getattr(recipe, section).model_dump(mode="json")
        workers = settings.pop("workers", None)
        print(f"  settings {section:<12} {json.dumps(settings)}")
        if workers:
            each = f"{workers['cpus']:g} CPU and {workers['gpus']:g} GPU"
            print(f"  takes    {'workers':<12} {workers['count']}, with {each} each")
    for label, value in _cost(name, recipe).items():
        print(f"  takes    {label:<12} {value}")


def _made(product: str) -> str:
    record = read_record(product)
    return f"made by run {record.run_id} in {record.seconds:.0f}s" if record else "not made yet"


def _cost(name: str, recipe: Recipe) -> dict[str, str]:
    """What can be known beforehand: steps, parameters. Of its files, encoding tells itself."""
    if name == "encode":
        return {}
    if name == "evaluate":
        section = recipe.evaluate
        return {"prompts": f"{section.single_prompts + section.double_prompts} for each model"}
    section = getattr(recipe, name)
    cost = {"steps": f"{section.steps} of {section.batch_size} samples"}
    network = _network(name, recipe)
    if network is None:
        return cost
    return {**cost, "weights": f"{sum(each.numel() for each in network.parameters()) / 1e6:.2f} M"}


def _network(name: str, recipe: Recipe) -> Any:
    """The network a stage trains, without memory; None if the recipe alone does not tell it."""
    import torch

    from ldm_core.autoencoders.training import new_autoencoder
    from ldm_core.backbones.dit import DiT, DiTConfig
    from pipelines.backbones import backbone_config, declared_space

    auto, text, section = recipe.autoencoder, recipe.text, recipe.train
    trained = auto.source == "train"
    with torch.device("meta"):
        if name == "autoencoder":
            levels = (auto.block_channels, auto.channels, auto.layers_per_block)
            return new_autoencoder(*levels, recipe.size, recipe.seed) if trained else None
        known = trained or auto.source == "identity"
        if name == "train" or not known or {text.t5, text.clip} != {"tiny"}:
            return None  # training tells more than this: its plan
        if section.backbone != "dit":
            return None
        space = declared_space(recipe)
        config = backbone_config(section, space.main, space.text_width, space.pooled_width)
        if not isinstance(config, DiTConfig):
            return None
        return DiT(config.model_copy(update={"flow_map": True}))
