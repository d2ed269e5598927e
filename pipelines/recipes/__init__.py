"""Named recipes: each is a function that returns a `Recipe`."""

from collections.abc import Callable

from pipelines.recipes.image_s import image_s, image_tiny
from pipelines.recipes.images import flux_12b, image_b, image_xl, mmdit_2b
from pipelines.recipes.schema import Recipe
from pipelines.recipes.videos import video_1b, video_14b, video_30b, video_s

RECIPES: dict[str, Callable[[], Recipe]] = {
    "image-s": image_s,
    "image-tiny": image_tiny,
    "image-b": image_b,
    "image-xl": image_xl,
    "mmdit-2b": mmdit_2b,
    "flux-12b": flux_12b,
    "video-s": video_s,
    "video-1b": video_1b,
    "video-14b": video_14b,
    "video-30b": video_30b,
}
