"""What a training reads: its stores' versions, looked at once by the driver, and the held-out rows.

The driver hands the index to the workers. Were each of hundreds to look at every file's footer, a
store would be asked for nothing else for minutes.
"""

from dataclasses import dataclass

import numpy as np

from ldm_core.backbones.embeddings import patch_grid
from ldm_core.files import absolute
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.reading.held_out import hold_out
from ldm_core.reading.index import StoreIndex, index_store
from ldm_core.reading.stream import StreamReader
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection

READ_AHEAD = 2  # steps


@dataclass(frozen=True)
class TrainingData:
    """Indexes of what is trained on, the recipe's own store first.

    Attributes:
        version: of the recipe's store.
        indexes: without what is held out.
        weights: how often each store is gone through in an epoch.
        held_out: of the recipe's store; None if the recipe holds nothing out.
    """

    version: StoreVersion
    indexes: tuple[StoreIndex, ...]
    weights: tuple[float, ...]
    held_out: StoreIndex | None = None

    @property
    def main(self) -> str:
        """The bucket of most samples."""
        samples = self.indexes[0].samples
        counts = np.bincount(samples.bucket, samples.count, len(samples.buckets))
        return samples.buckets[int(counts.argmax())]

    def budget(self, section: TrainSection) -> int:
        """Tokens of a micro-batch: what the recipe says, or its share of the batch of the main
        bucket."""
        each = tokens_of(self.indexes[0].samples.shapes[self.main], section.patch_size)
        return section.tokens or section.batch_size // section.parts * each

    def reader(self, section: TrainSection, seed: int) -> StreamReader:
        """Micro-batches as the recipe says."""
        shapes = {n: shape for each in self.indexes for n, shape in each.samples.shapes.items()}
        return StreamReader(
            self.indexes,
            seed=seed,
            lanes=section.parts,
            budget=self.budget(section),
            tokens=lambda bucket: tokens_of(shapes[bucket], section.patch_size),
            weights=self.weights,
        )


def find_data(recipe: Recipe, version: StoreVersion, hold: bool = True) -> TrainingData:
    """Look at the stores that a recipe trains on.

    Raises:
        UserError: a store without samples, or more to hold out than half of them.
    """
    section = recipe.train
    first, held = index_store(version), None
    if hold and section.validation_samples:
        first, held = hold_out(first, section.validation_samples, recipe.seed)
    others = [LatentStore(absolute(each.uri)).open_version(each.version) for each in section.mix]
    return TrainingData(
        version,
        (first, *map(index_store, others)),
        (1.0, *(each.weight for each in section.mix)),
        held,
    )


def tokens_of(latent: tuple[int, ...], patch_size: int) -> int:
    """Of a latent (C, h, w) or (C, T, h, w)."""
    h, w = patch_grid((latent[-2], latent[-1]), patch_size)
    return h * w * (latent[1] if len(latent) == 4 else 1)
