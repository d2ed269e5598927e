"""The fixed scenes a model is evaluated on: evenly spread, and from a stream of their own."""

from collections.abc import Iterator, Sequence
from itertools import islice, product
from typing import Literal, TypeVar

import numpy as np

from ldm_core.errors import UserError
from ldm_core.media.shapes import (
    BACKGROUNDS,
    COLORS,
    PAIR_SIZES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    pair_scene,
    random_stream,
    single_scene,
)

EVALUATION_STREAM = 1  # first number of the random key, as TRAINING_STREAM is training's
T = TypeVar("T")


def evaluation_scenes(kind: Literal["single", "double"], count: int, seed: int) -> list[Scene]:
    """`count` scenes of one or two objects, a function of (kind, count, seed).

    Every 32 scenes hold each (colour, shape) once (of the first object, for "double"), and the
    other attributes go round as evenly; a shorter list is the beginning of a longer one.

    Raises:
        UserError: an unknown kind, a count below 1 or a negative seed.
    """
    if kind not in ("single", "double"):
        raise UserError(f"kind is {kind!r}; use 'single' or 'double'")
    if count < 1:
        raise UserError(f"count is {count}; use at least 1")
    scenes = _singles(seed) if kind == "single" else _doubles(seed)
    return list(islice(scenes, count))


def _singles(seed: int) -> Iterator[Scene]:
    rng = random_stream(seed, EVALUATION_STREAM, 1)
    kinds = _rounds(rng, list(product(COLORS, SHAPES)))
    settings = _rounds(rng, list(product(SIZES, POSITIONS, BACKGROUNDS)))
    for kind, (size, position, background) in zip(kinds, settings, strict=False):
        yield single_scene(rng, kind, size, position, background)


def _doubles(seed: int) -> Iterator[Scene]:
    rng = random_stream(seed, EVALUATION_STREAM, 2)
    firsts = _rounds(rng, list(product(COLORS, SHAPES)))
    seconds = _rounds(rng, list(product(COLORS, SHAPES)))
    settings = _rounds(rng, list(product(PAIR_SIZES, RELATIONS, BACKGROUNDS)))
    for first, (sizes, relation, background) in zip(firsts, settings, strict=False):
        second = next(kind for kind in seconds if kind != first)
        yield pair_scene(rng, (first, second), sizes, relation, background)


def _rounds(rng: np.random.Generator, items: Sequence[T]) -> Iterator[T]:
    """The items in a new random order, again and again."""
    while True:
        for index in rng.permutation(len(items)):
            yield items[index]
