"""Whether a picture shows what its caption says, decided attribute by attribute.

A generated picture is scored without a reference picture and without another model: the
scene is known, and `find_objects` reads it back from the pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm_core.evaluation.found_objects import FoundObject, find_background, find_objects
from ldm_core.media.shapes import SIZES, Scene

__all__ = [
    "FoundObject",
    "Verdict",
    "find_background",
    "find_objects",
    "position_word",
    "relation_word",
    "size_word",
    "verify",
]

# Halfway between where "center" may lie (0.05 off the middle) and "left" begins (0.18 off).
CENTER_REACH = 0.115


@dataclass(frozen=True)
class Verdict:
    """Which attributes of the scene the picture shows.

    For one object the largest found is judged. For two objects `color` and `shape` ask for the
    same colours and shapes in whatever pairing, `both` for the right pairs, `position` for the
    relation. `both` is None for one object. `count`: exactly as many objects as expected.
    """

    color: bool
    shape: bool
    size: bool
    position: bool
    background: bool
    count: bool
    both: bool | None = None

    @property
    def all(self) -> bool:
        """Every attribute that applies holds."""
        named = (self.color, self.shape, self.size, self.position, self.background, self.count)
        return all(named) and self.both is not False


def verify(image: np.ndarray, scene: Scene) -> Verdict:
    """Judge an (H, W, 3) uint8 picture against the scene it was to show."""
    found = find_objects(image)
    background = find_background(image) == scene.background
    count = len(found) == len(scene.objects)
    if len(found) < len(scene.objects):
        both = None if len(scene.objects) == 1 else False
        return Verdict(False, False, False, False, background, count, both)
    if len(scene.objects) == 1:
        return _verify_single(found[0], scene, background, count)
    return _verify_pair(found[:2], scene, background, count)


def position_word(x: float, y: float) -> str:
    """The word for a place in the picture, x to the right and y down, both in 0..1."""
    return _direction(x - 0.5, y - 0.5, ("left", "right", "top", "bottom"), CENTER_REACH)


def relation_word(first: FoundObject, second: FoundObject) -> str:
    """Where `first` lies as seen from `second`."""
    words = ("left of", "right of", "above", "below")
    return _direction(first.x - second.x, first.y - second.y, words, 0.0)


def size_word(found: FoundObject) -> str:
    """The size whose box is nearest to the object's."""
    box = (found.width + found.height) / 2
    return min(SIZES, key=lambda size: abs(SIZES[size] - box))


def _direction(dx: float, dy: float, words: tuple[str, str, str, str], center_reach: float) -> str:
    left, right, top, bottom = words
    if max(abs(dx), abs(dy)) < center_reach:
        return "center"
    if abs(dx) >= abs(dy):
        return left if dx < 0 else right
    return top if dy < 0 else bottom


def _verify_single(found: FoundObject, scene: Scene, background: bool, count: bool) -> Verdict:
    expected = scene.objects[0]
    return Verdict(
        color=found.color == expected.color,
        shape=found.shape == expected.shape,
        size=size_word(found) == expected.size,
        position=position_word(found.x, found.y) == scene.position,
        background=background,
        count=count,
    )


def _verify_pair(
    found: Sequence[FoundObject], scene: Scene, background: bool, count: bool
) -> Verdict:
    """Match the two found objects to the expected ones by colour and shape, then compare."""
    expected = scene.objects

    def agreement(order: Sequence[FoundObject]) -> int:
        pairs = zip(order, expected, strict=True)
        return sum((f.color == e.color) + (f.shape == e.shape) for f, e in pairs)

    first, second = max((found, found[::-1]), key=agreement)
    kinds = sorted((thing.color, thing.shape) for thing in found)
    return Verdict(
        color=sorted(f.color for f in found) == sorted(e.color for e in expected),
        shape=sorted(f.shape for f in found) == sorted(e.shape for e in expected),
        size=[size_word(first), size_word(second)] == [e.size for e in expected],
        position=relation_word(first, second) == scene.relation,
        background=background,
        count=count,
        both=kinds == sorted((e.color, e.shape) for e in expected),
    )
