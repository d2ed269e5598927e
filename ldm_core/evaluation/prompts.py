"""The fixed scenes a model is evaluated on: evenly spread, and from a stream of their own."""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice, product
from typing import Literal, TypeVar

import numpy as np

from ldm_core.errors import UserError
from ldm_core.media.captions import PAIR_TEMPLATES, PLACES, RELATION_PHRASES, SINGLE_TEMPLATES
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


def is_scene_caption(caption: str) -> bool:
    """Whether a scene's caption may read like this, word for word."""
    return _scene_captions().fullmatch(caption) is not None


@cache
def _scene_captions() -> re.Pattern[str]:
    """All captions of the templates; neither they nor their words hold anything to escape."""
    color, shape, size = map(_any_of, (COLORS, SHAPES, SIZES))
    noun = f"an? {size} {color} {shape}"
    words = {
        "color": color,
        "a_color": f"an? {color}",
        "shape": shape,
        "size": size,
        "place": _any_of(PLACES.values()),
        "background": _any_of(BACKGROUNDS),
        "first": noun,
        "second": noun,
        "relation": _any_of(RELATIONS),
        "phrase": _any_of(RELATION_PHRASES.values()),
    }
    templates = (*SINGLE_TEMPLATES, *PAIR_TEMPLATES)
    return re.compile(_any_of(template.format(**words) for template in templates))


def _any_of(patterns: Iterable[str]) -> str:
    return f"(?:{'|'.join(patterns)})"


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
