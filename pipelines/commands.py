"""The shell line that does with a recipe what a function was just asked to do."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.credentials import masked
from pipelines.recipe_options import Arguments, flattened
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe


def command(recipe: Recipe, stage: str) -> str:
    """`ldm STAGE RECIPE` with all that differs from the recipe of this name, passwords masked."""
    known = RECIPES.get(recipe.name)
    if known is None:  # its fields are in a file of the user's
        return Arguments(f"{recipe.name}.json", recipe.data, recipe.root).command(stage)
    base = known().model_dump(mode="json")
    values = recipe.model_dump(mode="json")
    data, root = (values[key] if values[key] != base[key] else None for key in ("data", "root"))
    rest = {key: value for key, value in values.items() if key not in ("data", "root")}
    overrides = tuple(map(masked, _overrides(base, rest)))
    return Arguments(recipe.name, data, root, overrides).command(stage)


def shapes_command(recipe: Recipe, count: int) -> str:
    """The line that makes the procedural pictures where the recipe looks for them."""
    words = ["ldm", "shapes", recipe.data, "--count", str(count), "--size", str(recipe.size)]
    return shlex.join([*words, "--seed", str(recipe.seed)])


def _overrides(base: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
    """`a.b=c` for every value that is another than the base's."""
    known = dict(flattened(base))
    for key, value in flattened(values):
        if value != known[key]:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{key}={text}"
