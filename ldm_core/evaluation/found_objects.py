"""Find the coloured shapes in a picture: no learning, no randomness, no knowledge of the caption.

Foreground is what differs from the border's background. Its flat interior names the colours
(an edge mixes colours: the rim of red on white is pink), each object's outline is where it is
more itself than background, and its shape is the template of the same box it overlaps best.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ldm_core.media.shapes import BACKGROUNDS, COLORS, SHAPES, coverage

WORKING_SIDE = 64  # every picture is brought to between this and twice this
FOREGROUND = 40.0  # least RGB distance from the background; the closest palette pair has 95
FLAT = 48  # greatest range of a channel over 3 x 3 flat pixels, for noise of about 8 levels
FLAT_SHARE = 0.35  # and greatest share of the object's contrast: a blurred edge has half of it
SPECK = 0.008  # least area of an object, of the picture; a small triangle has 0.039
SEED = 0.002  # least flat area of a colour that makes it an object of its own
LEAST_IOU = 0.7  # below it no shape is recognised

_PALETTE = {**COLORS, **BACKGROUNDS}
_NAMES = tuple(_PALETTE)
_LEVELS = np.array(list(_PALETTE.values()), dtype=float)


@dataclass(frozen=True)
class FoundObject:
    """One object; its box's centre (x, y), width and height are fractions of the picture.

    `shape` is "unknown" when the best template's overlap `iou` is below LEAST_IOU.
    """

    color: str
    shape: str
    x: float
    y: float
    width: float
    height: float
    iou: float


def find_background(image: np.ndarray) -> str:
    """The background named by most of the border's pixels; image is (H, W, 3) uint8."""
    return _background(_working_copy(image))[0]


def find_objects(image: np.ndarray) -> list[FoundObject]:
    """The objects of an (H, W, 3) uint8 picture, largest area first; specks are left out."""
    pixels = _working_copy(image)
    rows, columns = pixels.shape[:2]
    _, backdrop = _background(pixels)
    foreground = np.linalg.norm(pixels - backdrop, axis=-1) > FOREGROUND
    spread = _spread(pixels)
    components, _ = ndimage.label(foreground)
    areas = np.bincount(components.ravel())
    areas[0] = 0
    least = SPECK * rows * columns
    regions = [
        region
        for index in np.flatnonzero(areas >= least)
        for region in _split_by_color(pixels, components == index, spread, backdrop)
    ]
    masks = [(color, _outline(pixels, region, backdrop)) for color, region in regions]
    masks = [(color, mask) for color, mask in masks if mask.sum() >= least]
    masks.sort(key=lambda pair: -int(pair[1].sum()))
    return [_describe(color, mask) for color, mask in masks]


def _working_copy(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) float near WORKING_SIDE: thresholds then mean the same at any size."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    if min(height, width) < WORKING_SIDE:  # outlines between pixels: corners of small shapes
        scale = -(-WORKING_SIDE // min(height, width))
        size = (width * scale, height * scale)
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        return image.astype(float)
    block = min(height, width) // WORKING_SIDE
    rows, columns = height // block, width // block
    whole = image[: rows * block, : columns * block].astype(float)
    return whole.reshape(rows, block, columns, block, 3).mean(axis=(1, 3))


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and actual colour (3,) of the background, from the outermost ring of pixels."""
    ring = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    levels = np.array(list(BACKGROUNDS.values()), dtype=float)
    votes = np.linalg.norm(ring[:, None] - levels, axis=-1).argmin(axis=1)
    winner = np.bincount(votes).argmax()
    return tuple(BACKGROUNDS)[winner], np.median(ring[votes == winner], axis=0)


def _spread(pixels: np.ndarray) -> np.ndarray:
    """Greatest range of a channel in each 3 x 3 neighbourhood: (H, W)."""
    window = (3, 3, 1)
    spread = ndimage.maximum_filter(pixels, window) - ndimage.minimum_filter(pixels, window)
    return spread.max(axis=-1)


def _split_by_color(
    pixels: np.ndarray, component: np.ndarray, spread: np.ndarray, backdrop: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Cut one connected component (H, W) where objects of different colours touch.

    A colour is an object's if it fills flat blocks of 3 x 3 pixels; rims are thin and steep.
    """
    core = _core(pixels, component)
    flat = component & (spread <= min(FLAT, FLAT_SHARE * abs(core - backdrop).max()))
    names = np.full(component.shape, -1)
    names[flat] = _nearest(pixels[flat])
    block = np.ones((3, 3))
    areas = {int(n): ndimage.binary_opening(names == n, block) for n in np.unique(names[flat])}
    seeds = {n: area for n, area in areas.items() if area.sum() >= SEED * component.size}
    if len(seeds) < 2:
        return [(_NAMES[int(_nearest(core[None])[0])], component)]
    owner = np.full(component.shape, -1)
    for name, area in seeds.items():
        owner[area] = name
    _, (row, column) = ndimage.distance_transform_edt(owner < 0, return_indices=True)
    owner = owner[row, column]
    return [(_NAMES[name], component & (owner == name)) for name in seeds]


def _core(pixels: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Median colour (3,) of the region's innermost pixels."""
    depth = ndimage.distance_transform_edt(region)
    return np.median(pixels[depth >= 0.6 * depth.max()], axis=0)


def _nearest(colors: np.ndarray) -> Any:
    """(N, 3) colours -> (N,) indices of the nearest palette entries."""
    return np.linalg.norm(colors[:, None] - _LEVELS, axis=-1).argmin(axis=1)


def _outline(pixels: np.ndarray, region: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    """The region's pixels that are object by more than half, in its largest connected piece."""
    contrast = _core(pixels, region) - backdrop
    share = (pixels - backdrop) @ contrast / max(float(contrast @ contrast), 1.0)
    pieces, count = ndimage.label(region & (share > 0.5))
    if count == 0:
        return np.zeros_like(region)
    return pieces == np.bincount(pieces.ravel())[1:].argmax() + 1


def _describe(color: str, mask: np.ndarray) -> FoundObject:
    """Box and best template of one object's mask (H, W)."""
    rows, columns = mask.shape
    (down, across) = ndimage.find_objects(mask.astype(int))[0]
    width, height = across.stop - across.start, down.stop - down.start
    x, y = (across.start + across.stop) / 2, (down.start + down.stop) / 2
    shape, iou = _best_template(mask[down, across])
    return FoundObject(
        color=color,
        shape=shape if iou >= LEAST_IOU else "unknown",
        x=x / columns,
        y=y / rows,
        width=width / columns,
        height=height / rows,
        iou=iou,
    )


def _best_template(mask: np.ndarray) -> tuple[str, float]:
    """The shape that overlaps an object's box (H, W) best, and its intersection over union."""
    height, width = mask.shape
    mask = np.pad(mask, abs(width - height) + 1)
    overlaps = {}
    for shape in SHAPES:
        inside = _template(shape, height, width)
        overlaps[shape] = float((mask & inside).sum() / (mask | inside).sum())
    best = max(SHAPES, key=lambda shape: overlaps[shape])
    return best, overlaps[best]


@lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """Mask of a shape centred where `_best_template` pads a box of this height and width to.

    Templates are square, so that a stretched blob fits none of them.
    """
    padding = 2 * (abs(width - height) + 1)
    rows, columns = height + padding, width + padding
    edge = (width + height) / 2
    return coverage(shape, columns / 2, rows / 2, edge, rows, columns) >= 0.5
