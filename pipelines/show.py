"""`ldm show`: a recipe as JSON, or what is in a model directory or a latent store."""

import json
from typing import Any

from ldm_core.errors import UserError
from ldm_core.files import exists, is_remote, join, read_json
from pipelines.model_uri import model_uri
from pipelines.recipe_options import Arguments
from pipelines.recipes import RECIPES


def show(arguments: Arguments) -> str:
    """JSON of what the words name: a recipe with its overrides, a model, or a store's version.

    Raises:
        UserError: no such recipe, and nothing at this place.
    """
    name = arguments.recipe
    if name in RECIPES or name.endswith(".json"):
        return arguments.resolve().model_dump_json(indent=2)
    name = model_uri(name)
    if is_remote(name) or "/" in name or exists(name):
        return json.dumps(_product(name), indent=2)
    arguments.resolve()  # says which recipes there are
    raise AssertionError(name)


def list_recipes() -> str:
    """One line for each recipe: its name and what it is for."""
    width = max(map(len, RECIPES))
    lines = ((name, (make.__doc__ or "").splitlines()[0]) for name, make in RECIPES.items())
    return "\n".join(f"{name:<{width}}  {line}" for name, line in lines)


def _product(uri: str) -> dict[str, Any]:
    if exists(join(uri, "config.json")):
        return {"model": uri, **read_json(join(uri, "config.json"))}
    from ldm_core.latents.store import LatentStore  # here: it takes a second to import

    if not exists(uri):
        raise UserError(f"nothing at {uri}; name a recipe, a model directory or a latent store")
    return LatentStore(uri).open_version().manifest.model_dump(mode="json")
