"""What an epoch of a training is, counted before any latents are read."""

from collections.abc import Iterator, Sequence

from ldm_core.latents.store import StoreVersion
from pipelines.recipes.schema import Recipe
from pipelines.training_data import find_data

MOST = 1_000_000  # samples of stores that are looked at
MOST_PARTS = 100_000  # micro-batches that are gone through; more take minutes


def say_epoch(recipe: Recipe, version: StoreVersion, mix: Sequence[StoreVersion]) -> None:
    """Go through the order of an epoch as the workers would, and say how often each sample comes.

    Raises:
        UserError: more to hold out than half of the store.
    """
    for line in _lines(recipe, version, mix):
        print(f"  plan     {'epoch':<12} {line}")


def _lines(recipe: Recipe, version: StoreVersion, mix: Sequence[StoreVersion]) -> Iterator[str]:
    count = sum(each.manifest.counts["samples"] for each in (version, *mix))
    if count > MOST:
        yield f"of {count:,} samples, which are more than are counted here ({MOST:,})"
        return
    data = find_data(recipe, version, mix=mix)
    held = int(data.held_out.samples.count.sum()) if data.held_out else 0
    with data.reader(recipe.train, recipe.seed) as reader:
        steps = len(reader.order.steps(0))
        if steps * reader.lanes > MOST_PARTS:
            yield f"of {count:,} samples in {steps:,} steps, not counted; {held:,} held out"
            return
        accounts = reader.account(range(1))
    assert all(each.holds for each in accounts), [each.store for each in accounts if not each.holds]
    seen = sum(int(each.seen.sum()) for each in accounts)
    often = "each once" if not mix else "each as often as its store's weight says"
    yield f"{seen:,} samples in {steps:,} steps, {often}; {held:,} held out"
