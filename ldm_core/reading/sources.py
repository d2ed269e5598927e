"""Several stores as one: what they must share, and the statistics of their mixture."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from ldm_core.errors import UserError
from ldm_core.latents.manifest import LatentStatistics, Manifest
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.mixture import Units

_SHARED: dict[str, Callable[[Manifest], object]] = {
    "autoencoder": lambda manifest: manifest.autoencoder.digest,
    "number of channels": lambda manifest: manifest.channels,
    "downsampling": lambda manifest: manifest.downsampling,
    "text encoders": lambda manifest: {entry.name: entry.digest for entry in manifest.texts},
}


def check_alike(indexes: Sequence[StoreIndex]) -> None:
    """See that one network can learn from all of the stores.

    Raises:
        UserError: none, two versions of one store, or other encoders or shapes.
    """
    if not indexes:
        raise UserError("no store to read from: name at least one")
    first = indexes[0]
    for place, other in enumerate(indexes[1:], 1):
        for what, of in _SHARED.items():
            _refuse_unlike(first, other, what, of(first.manifest), of(other.manifest))
        shapes, others = first.samples.shapes, other.samples.shapes
        for bucket in shapes.keys() & others.keys():
            _refuse_unlike(first, other, f"shape of {bucket}", shapes[bucket], others[bucket])
        if other.uri in [index.uri for index in indexes[:place]]:
            raise UserError(f"{other.uri} is named twice: give it the weights' sum instead")


def _refuse_unlike(
    first: StoreIndex, other: StoreIndex, what: str, found: object, found_there: object
) -> None:
    if found != found_there:
        raise UserError(
            f"{first.name} and {other.name} differ in the {what}, {found} and {found_there}: "
            "encode one of them anew as the other was, or train on one alone"
        )


def shapes_of(indexes: Sequence[StoreIndex]) -> dict[str, tuple[int, ...]]:
    """Of each bucket's latents, by name, sorted."""
    found = {name: shape for index in indexes for name, shape in index.samples.shapes.items()}
    return dict(sorted(found.items()))


def units_of(index: StoreIndex) -> dict[str, Units]:
    """A store's units, by bucket."""
    samples = index.samples
    numbers = {name: samples.units(name) for name in samples.buckets}
    return {name: Units(units, samples.count[units]) for name, units in numbers.items()}


def mixed_statistics(
    indexes: Sequence[StoreIndex], weights: Sequence[Fraction]
) -> LatentStatistics:
    """Of the latents as they are mixed; those of the stores where they agree.

    Means and second moments add up, as the samples of an epoch do.
    """
    stated = [index.manifest.statistics for index in indexes]
    if all(each == stated[0] for each in stated):
        return stated[0]
    counts = [int(index.samples.count.sum(dtype=np.int64)) for index in indexes]
    shares = np.array([float(w * n) for w, n in zip(weights, counts, strict=True)])
    shares /= shares.sum()
    means, stds = (np.array([getattr(each, name) for each in stated]) for name in ("mean", "std"))
    mean = shares @ means
    std = np.sqrt(np.maximum(shares @ (stds**2 + means**2) - mean**2, 0.0))
    return LatentStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def bytes_per_sample(
    indexes: Sequence[StoreIndex], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Of each bucket, decoded: mean and log-variance, and a caption's embeddings."""
    text = max(index.texts.mean_bytes for index in indexes)
    return {name: 4 * int(np.prod(shape)) + int(text) for name, shape in shapes.items()}
