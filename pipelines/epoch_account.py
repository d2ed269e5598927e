"""What an epoch of a training is, counted before anything is read."""

from collections.abc import Sequence

from ldm_core.latents.store import StoreVersion
from pipelines.recipes.schema import Recipe
from pipelines.training_data import find_data

MOST = 1_000_000  # samples that are counted; more take minutes


def say_epoch(recipe: Recipe, version: StoreVersion, mix: Sequence[StoreVersion]) -> None:
    """Go through the order of an epoch as the workers would, and say how often each sample comes.

    Raises:
        UserError: more to hold out than half of the store.
    """
    if sum(each.manifest.counts["samples"] for each in (version, *mix)) > MOST:
        return
    data = find_data(recipe, version, mix=mix)
    with data.reader(recipe.train, recipe.seed) as reader:
        accounts = reader.account(range(1))
        steps = len(reader.order.steps(0))
    seen = sum(int(each.seen.sum()) for each in accounts)
    assert all(each.holds for each in accounts), [each.store for each in accounts if not each.holds]
    often = "each once" if not mix else "each as often as its store's weight says"
    held = int(data.held_out.samples.count.sum()) if data.held_out else 0
    print(
        f"  plan     {'epoch':<12} {seen:,} samples in {steps:,} steps, {often}; {held:,} held out"
    )
