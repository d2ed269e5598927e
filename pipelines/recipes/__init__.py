"""Named recipes: each is a function that returns a `Recipe`."""

from collections.abc import Callable

from pipelines.recipes.image_s import image_s, image_tiny
from pipelines.recipes.schema import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {"image-s": image_s, "image-tiny": image_tiny}
