"""Recipes of `image-tiny` for the small stores that trainings are planned of, and plans of any."""

from functools import cache

from pipelines.backbones import declared_space
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.train_plan import TrainingPlan, plan_training

WORDS = ("image-tiny", "--root", "run", "--set", "size=8")


def tiny(*words: str) -> Recipe:
    return Arguments("image-tiny", root="run", overrides=("size=8", *words)).resolve()


@cache
def planned(name: str, *overrides: str) -> TrainingPlan:
    """The plan of a recipe before there is a store, made once for all who look at it."""
    recipe = Arguments(name, overrides=overrides).resolve()
    return plan_training(recipe, declared_space(recipe))
