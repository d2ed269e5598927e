"""A procedural captioned data set: coloured shapes whose pictures a program can check.

Every scene is a function of (seed, index), so a data set is reproducible from two numbers, any
part of it can be made anywhere, and captions determine pictures up to a small jitter of place.
Coordinates are fractions of the picture's side: x to the right, y down, (0, 0) top left.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_core.errors import UserError
from ldm_core.media.captions import pair_caption, single_caption

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (40, 200, 220),
    "pink": (245, 130, 180),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.28, "large": 0.5}  # side of the object's box
POSITIONS = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "right of", "above", "below")
# Two large boxes fill the whole side, so a pair has at most one.
PAIR_SIZES = (("small", "small"), ("small", "large"), ("large", "small"))

SINGLE_SHARE = 0.65
MARGIN = 0.02  # least distance of a box from the border
GAP = 0.06  # least distance between two boxes along their relation
NEAR_SIDE = 0.32  # an object "on the left" has its centre left of this
JITTER = 0.05  # around the middle, where the word says nothing
PAIR_JITTER = 0.1
SUBPIXELS = 8  # samples per pixel and axis: 64 levels of coverage

TRAINING_STREAM = 0  # first number of the random key; evaluation draws from another
MIN_SIDE, MAX_SIDE, MAX_COUNT = 16, 2048, 1_000_000
CAPTIONS = "captions.jsonl"


@dataclass(frozen=True)
class SceneObject:
    """One shape; (x, y) is the centre of its box as a fraction of the picture's side."""

    color: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def box(self) -> float:
        """Side of the square box the shape fills, as a fraction of the picture's side."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one object at a `position`, or objects[0] `relation` objects[1]."""

    objects: tuple[SceneObject, ...]
    background: str
    caption: str
    position: str | None
    relation: str | None


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """The generator of (seed, key): streams of different keys are independent.

    Raises:
        UserError: a negative seed.
    """
    if seed < 0:
        raise UserError(f"seed is {seed}; use 0 or a positive number")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def draw_scene(seed: int, index: int, objects: int | None = None) -> Scene:
    """Scene `index` of the training stream `seed`, with `objects` (1, 2; None: either)."""
    if objects not in (None, 1, 2):
        raise UserError(f"objects is {objects}; a scene has 1 or 2, or None for either")
    rng = random_stream(seed, TRAINING_STREAM, index)
    single_drawn = rng.random() < SINGLE_SHARE  # drawn in any case: the stream keeps its place
    background = _pick(rng, tuple(BACKGROUNDS))
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    first, second = (kinds[i] for i in rng.choice(len(kinds), size=2, replace=False))
    if objects == 1 or (objects is None and single_drawn):
        return single_scene(rng, first, _pick(rng, tuple(SIZES)), _pick(rng, POSITIONS), background)
    sizes = PAIR_SIZES[int(rng.integers(len(PAIR_SIZES)))]
    return pair_scene(rng, (first, second), sizes, _pick(rng, RELATIONS), background)


def single_scene(
    rng: np.random.Generator, kind: tuple[str, str], size: str, position: str, background: str
) -> Scene:
    """One object of `kind` (colour, shape) near the place its word names."""
    color, shape = kind
    near = rng.uniform(SIZES[size] / 2 + MARGIN, NEAR_SIDE)
    x, y = rng.uniform(0.5 - JITTER, 0.5 + JITTER, size=2)
    x = {"left": near, "right": 1 - near}.get(position, x)
    y = {"top": near, "bottom": 1 - near}.get(position, y)
    caption = single_caption(
        rng, color=color, shape=shape, size=size, position=position, background=background
    )
    thing = SceneObject(color, shape, size, _rounded(x), _rounded(y))
    return Scene((thing,), background, caption, position, None)


def pair_scene(
    rng: np.random.Generator,
    kinds: tuple[tuple[str, str], tuple[str, str]],
    sizes: tuple[str, str],
    relation: str,
    background: str,
) -> Scene:
    """Two objects, the first of which is `relation` the second; `sizes` is one of PAIR_SIZES."""
    boxes = [SIZES[size] for size in sizes]
    slack = 1 - 2 * MARGIN - GAP - sum(boxes)
    before, after = np.sort(rng.uniform(0, slack, size=2))
    lead = 0 if relation in ("left of", "above") else 1
    along = [0.0, 0.0]
    along[lead] = MARGIN + before + boxes[lead] / 2
    along[1 - lead] = MARGIN + boxes[lead] + GAP + after + boxes[1 - lead] / 2
    across = rng.uniform(0.5 - PAIR_JITTER, 0.5 + PAIR_JITTER, size=2)
    xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
    first, second = (
        SceneObject(*kinds[i], sizes[i], _rounded(xs[i]), _rounded(ys[i])) for i in range(2)
    )
    caption = pair_caption(
        rng, first=_noun(first), second=_noun(second), relation=relation, background=background
    )
    return Scene((first, second), background, caption, None, relation)


def coverage(shape: str, x: float, y: float, box: float, rows: int, columns: int) -> np.ndarray:
    """Share of each pixel inside the shape, (rows, columns) in [0, 1]; x, y, box in pixels."""
    u = ((np.arange(columns * SUBPIXELS) + 0.5) / SUBPIXELS - x) / (box / 2)
    v = ((np.arange(rows * SUBPIXELS) + 0.5) / SUBPIXELS - y) / (box / 2)
    inside = _inside(shape, u[None, :], v[:, None])
    return inside.reshape(rows, SUBPIXELS, columns, SUBPIXELS).mean(axis=(1, 3))


def render_scene(scene: Scene, side: int) -> Image.Image:
    """The picture of a scene: RGB, side x side, anti-aliased."""
    canvas = np.empty((side, side, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        _paint(canvas, thing)
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def write_shapes(
    out: Path,
    count: int,
    size: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write `count` pictures of `size` pixels to out/images and their out/captions.jsonl.

    The captions come last and in one rename: a folder with captions is a whole data set, and a
    killed run is repeated by the same command. `on_progress` gets the number written so far.

    Raises:
        UserError: a count, size or seed out of range, or a folder holding other pictures.
    """
    if not 1 <= count <= MAX_COUNT:
        raise UserError(f"count is {count}; use 1 to {MAX_COUNT}")
    if not MIN_SIDE <= size <= MAX_SIDE:
        raise UserError(f"size is {size} pixels; use {MIN_SIDE} to {MAX_SIDE}")
    _refuse_other_pictures(out / "images", {_name(index) for index in range(count)})
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / CAPTIONS).unlink(missing_ok=True)
    lines = []
    for index in range(count):
        scene = draw_scene(seed, index)
        _save(render_scene(scene, size), out / "images" / _name(index))
        lines.append(caption_line(scene, index) + "\n")
        if on_progress:
            on_progress(index + 1)
    partial = out / f"{CAPTIONS}.partial"
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, out / CAPTIONS)


def caption_line(scene: Scene, index: int) -> str:
    """The line of `captions.jsonl` that describes picture `index`."""
    return json.dumps(_record(scene, f"images/{_name(index)}"))


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether (u, v), the box being [-1, 1] squared and v pointing down, is in the shape."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    in_box = (abs(u) <= 1) & (abs(v) <= 1)
    if shape == "square":
        return in_box
    if shape == "triangle":
        return in_box & (2 * abs(u) <= v + 1)
    assert shape == "cross", shape
    return in_box & ((abs(u) <= 1 / 3) | (abs(v) <= 1 / 3))


def _paint(canvas: np.ndarray, thing: SceneObject) -> None:
    """Blend one object into the canvas (H, W, 3), touching only the pixels of its box."""
    side = len(canvas)
    x, y, box = thing.x * side, thing.y * side, thing.box * side
    left, top = max(0, int(x - box / 2)), max(0, int(y - box / 2))
    window = canvas[top : int(y + box / 2) + 1, left : int(x + box / 2) + 1]
    share = coverage(thing.shape, x - left, y - top, box, *window.shape[:2])[..., None]
    window[:] = (1 - share) * window + share * np.array(COLORS[thing.color])


def _record(scene: Scene, file: str) -> dict[str, object]:
    record = {"file": file, **asdict(scene)}
    return {key: value for key, value in record.items() if value is not None}


def _name(index: int) -> str:
    """Mostly PNG, and every tenth a JPEG or a WebP, so that readers of both are exercised."""
    return f"{index:06d}" + {3: ".jpg", 7: ".webp"}.get(index % 10, ".png")


def _save(image: Image.Image, path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        ".png": {},
        ".jpg": {"quality": 95, "subsampling": 0},
        ".webp": {"lossless": True},
    }
    image.save(path, **options[path.suffix])


def _refuse_other_pictures(folder: Path, expected: set[str]) -> None:
    """Pictures left from another run would lie beside the new captions without one."""
    others = sorted(p.name for p in folder.glob("*") if p.name not in expected)
    if others:
        raise UserError(
            f"{folder} already holds {len(others)} other files, such as {others[0]}: "
            "choose an empty folder, or delete this one first"
        )


def _noun(thing: SceneObject) -> str:
    return f"{thing.size} {thing.color} {thing.shape}"


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _rounded(fraction: float) -> float:
    """Four places are a tenth of a pixel at 1024 and keep the records readable."""
    return round(float(fraction), 4)
