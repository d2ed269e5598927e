"""Whether models learnt from the pictures of `ldm shapes`: `ldm evaluate` can judge no others."""

from collections.abc import Iterator
from itertools import islice

from ldm_core.errors import UserError
from ldm_core.evaluation.prompts import is_scene_caption
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.model_directory import ModelConfig
from pipelines.recipes.schema import Recipe

NAMED = 3  # of the captions that are not the shapes'


def made_of_shapes(recipe: Recipe) -> bool:
    """Whether the newest version of the recipe's store holds nothing else, if there is one."""
    store = LatentStore(recipe.product("latents"))
    return not store.versions() or next(other_captions(store.open_version()), None) is None


def refuse_other_pictures(recipe: Recipe, kind: str, config: ModelConfig) -> None:
    """Refuse a model that the judge's verdicts would say nothing about.

    A model whose store is gone is taken for one of shapes.

    Raises:
        UserError: it was trained on other pictures than shapes.
    """
    version = _trained_on(recipe, config)
    others = list(islice(other_captions(version), NAMED)) if version else []
    if others:
        named = ", ".join(f"{file} ({caption!r})" for file, caption in others)
        raise UserError(
            f"the {kind} was trained on pictures that `ldm shapes` did not make, such as {named}, "
            "and the judge knows no others: look at what `ldm sample --model "
            f"{recipe.product(kind)}` draws, and at the pictures of the training's MLflow run"
        )


def other_captions(version: StoreVersion) -> Iterator[tuple[str, str]]:
    """(file, caption) of what is not worded as the shapes' captions are."""
    for batch in version.batches("samples", ["id", "captions"]):
        for row in batch.to_pylist():
            captions = [entry["caption"] for entry in row["captions"]]
            yield from ((row["id"], each) for each in captions if not is_scene_caption(each))


def _trained_on(recipe: Recipe, config: ModelConfig) -> StoreVersion | None:
    store, content = LatentStore(recipe.product("latents")), config.lineage.get("store_content")
    versions = map(store.open_version, reversed(store.versions()))
    return next((each for each in versions if each.manifest.content == content), None)
