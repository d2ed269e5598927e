"""Recipes of `image-tiny` for the small stores that trainings are planned of."""

from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe

WORDS = ("image-tiny", "--root", "run", "--set", "size=8")


def tiny(*words: str) -> Recipe:
    return Arguments("image-tiny", root="run", overrides=("size=8", *words)).resolve()
