"""What a training reads: its stores' versions, looked at once by the driver, and the held-out rows.

The driver hands the index to the workers. Were each of hundreds to look at every file's footer, a
store would be asked for nothing else for minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ldm_core.backbones.embeddings import patch_grid
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.held_out import hold_out, leave_out, sources_of
from ldm_core.reading.index import StoreIndex, index_store
from ldm_core.reading.stream import MIB, StreamReader
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection
from pipelines.train_inputs import initial_statistics, mixed_versions

READ_AHEAD = 2  # steps
WINDOW_BYTES, WINDOWS_BYTES = 256 * MIB, 4096 * MIB  # of a lane's windows, and of all lanes'


@dataclass(frozen=True)
class TrainingData:
    """Indexes of what is trained on, the recipe's own store first.

    Attributes:
        version: of the recipe's store.
        indexes: without what is held out.
        weights: how often each store is gone through in an epoch.
        held_out: of the recipe's store; None if the recipe holds nothing out.
        statistics: of the model that training starts from; None are the stores'.
    """

    version: StoreVersion
    indexes: tuple[StoreIndex, ...]
    weights: tuple[float, ...]
    held_out: StoreIndex | None = None
    statistics: LatentStatistics | None = None

    @property
    def main(self) -> str:
        """The bucket of most samples."""
        return self.indexes[0].samples.main

    def budget(self, section: TrainSection) -> int:
        """Tokens of a micro-batch: what the recipe says, or its share of the batch of the main
        bucket."""
        each = tokens_of(self.indexes[0].samples.shapes[self.main], section.patch_size)
        return section.tokens or section.batch_size // section.parts * each

    def reader(self, section: TrainSection, seed: int) -> StreamReader:
        """Micro-batches as the recipe says.

        The windows decide the order, and so their size may depend on the number of micro-batches,
        but not on how many of these a worker computes.
        """
        shapes = {n: shape for each in self.indexes for n, shape in each.samples.shapes.items()}
        return StreamReader(
            self.indexes,
            seed=seed,
            lanes=section.parts,
            budget=self.budget(section),
            tokens=lambda bucket: tokens_of(shapes[bucket], section.patch_size),
            weights=self.weights,
            statistics=self.statistics,
            window_bytes=window_bytes(section.parts),
        )


def window_bytes(parts: int) -> int:
    """Of a lane's windows, so that a process of all `parts` lanes has room for them."""
    return max(1, min(WINDOW_BYTES, WINDOWS_BYTES // parts))


def find_data(
    recipe: Recipe,
    version: StoreVersion,
    hold: bool = True,
    mix: Sequence[StoreVersion] | None = None,
) -> TrainingData:
    """Look at the stores that a recipe trains on.

    What is held out of the recipe's store is left out of the others. A model directory to start
    from says how latents are normalised; after a diffusers transformer, which does not, the stores
    say it.

    Args:
        recipe: its initial model is named by folder.
        version: of its own store.
        hold: whether samples are held out.
        mix: versions of the further stores; None are those that the recipe names.

    Raises:
        UserError: a store without samples, or more to hold out than half of them.
    """
    section = recipe.train
    first, held = index_store(version), None
    others = [index_store(each) for each in (mixed_versions(recipe) if mix is None else mix)]
    if hold and section.validation_samples:
        first, held = hold_out(first, section.validation_samples, recipe.seed)
        if others:
            sources = sources_of(held)
            others = [leave_out(other, sources) for other in others]
    return TrainingData(
        version,
        (first, *others),
        (1.0, *(each.weight for each in section.mix)),
        held,
        initial_statistics(section.initial),
    )


def tokens_of(latent: tuple[int, ...], patch_size: int) -> int:
    """Of a latent (C, h, w) or (C, T, h, w)."""
    h, w = patch_grid((latent[-2], latent[-1]), patch_size)
    return h * w * (latent[1] if len(latent) == 4 else 1)
