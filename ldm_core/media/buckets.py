"""Aspect-ratio buckets of images, and aspect x duration buckets of video: geometry alone.

A batch has one size, pictures have any. Cropping all to squares cuts off heads and feet (SDXL,
Podell et al. 2023, https://arxiv.org/abs/2307.01952, section 2.3), so each goes to the bucket
nearest its shape. All are the largest boxes within one budget of pixels: no bucket needs more
memory than the square one.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from ldm_core.errors import BadMedia, UserError

Crop = tuple[int, int, int, int]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Bucket:
    """The size media is encoded at: pixels and frames."""

    height: int
    width: int
    frames: int = 1

    @property
    def name(self) -> str:
        """As in the store's `bucket` column: "HxWxT"."""
        return f"{self.height}x{self.width}x{self.frames}"

    @classmethod
    def parse(cls, name: str) -> "Bucket":
        """The bucket of a name.

        Raises:
            UserError: not three positive whole numbers.
        """
        sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", name, re.ASCII)
        if sides is None:
            raise UserError(
                f"{name!r} is no bucket: write height x width x frames, such as 256x320x1"
            )
        return cls(*(int(side) for side in sides.groups()))


def causal_lengths(longest: int, stride: int) -> tuple[int, ...]:
    """Lengths 1 + stride * k up to `longest` frames: those a causal video autoencoder encodes.

    It takes the first frame alone and the others in groups of `stride`.

    Raises:
        UserError: either is not positive.
    """
    if longest < 1 or stride < 1:
        raise UserError(
            f"lengths up to {longest} frames in steps of {stride}: both are to be at least 1"
        )
    return tuple(range(1, longest + 1, stride))


@dataclass(frozen=True)
class Geometry:
    """Which buckets there are, and which of them a picture or clip goes to.

    With r = multiple / size, a bucket of the top scale has more than (1 - r) * size^2 pixels and
    at most size^2. The aspect of a picture within `max_aspect` that goes to the top scale is off
    by less than a factor (1 + r * sqrt(max_aspect))^2 / (1 - r), and what is cropped away is
    1 - 1 / factor: at most 21 % of a picture at 256 by 16, and 4 % on average.

    Proof, for a landscape of aspect a: let x = size / sqrt(a) and s the next multiple from x up,
    so s < x + multiple. The bucket with short side s has a long side l > size^2 / s - multiple
    and l / s <= size^2 / s^2 <= a, so it is among the buckets; and a / (l / s) is less than
    (s / x)^2 / (1 - multiple * s / size^2), which is largest for the least x and s = size.

    Pictures that would have to be enlarged go down a ladder of scales, each of half the pixels of
    the one above. Random sizes keep 70 % of their pixels (512 by 16) and at the worst 40 %; halved
    sides would keep 57 and 20 %, and finer steps would scatter a data set over more buckets than
    batches can be filled from.

    Attributes:
        size: side of the square bucket, pixels.
        multiple: of which every side is one, pixels: downsampling x patch.
        max_aspect: no bucket's long side is more than this times its short one; 1.0 gives squares.
        upscale: enlarge small pictures to the top scale, which is then the only one.
        frames: lengths of clips, ascending.

    Raises:
        UserError: a setting out of range.
    """

    size: int
    multiple: int
    max_aspect: float = 2.0
    upscale: bool = False
    frames: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise UserError(f"multiple is {self.multiple}: use downsampling x patch, 1 or more")
        if self.size < 1 or self.size % self.multiple:
            near = max(1, round(self.size / self.multiple)) * self.multiple
            raise UserError(
                f"size {self.size} is not a multiple of {self.multiple} pixels (downsampling x "
                f"patch): try {near}"
            )
        if not 1 <= self.max_aspect < math.inf:
            raise UserError(f"max_aspect is {self.max_aspect}: use 1.0 (squares only) or more")
        ascending = list(self.frames) == sorted(set(self.frames))
        if not self.frames or self.frames[0] < 1 or not ascending:
            raise UserError(
                f"frames {self.frames} are to be positive and ascending, such as (1, 17, 33)"
            )

    def buckets(self) -> list[Bucket]:
        """All buckets: largest scale first, tallest to widest, shortest to longest."""
        return [
            replace(bucket, frames=length)
            for scale in self._scales
            for bucket in scale
            for length in self.frames
        ]

    def choose(self, height: int, width: int, frames: int = 1) -> Bucket:
        """The bucket of media of this size, pixels and frames.

        It is the one of nearest log-aspect on the first scale where nothing is enlarged, and the
        longest of the lengths the clip has. Extreme aspects lose their ends, never the picture.

        Raises:
            BadMedia: stage "decode"; reason "too small": a side is less than `multiple`, and
                `upscale` is off; "too short": fewer frames than any length.
        """
        length = max((n for n in self.frames if n <= frames), default=None)
        if length is None:
            detail = f"{frames} frames, the shortest bucket has {self.frames[0]}"
            raise BadMedia("decode", "too short", detail)
        for scale in self._scales:
            bucket = min(scale, key=lambda one: _mismatch(one, height, width))
            if self.upscale or (bucket.height <= height and bucket.width <= width):
                return replace(bucket, frames=length)
        raise BadMedia(
            "decode",
            "too small",
            f"{width} x {height} pixels, and a side is to have {self.multiple}: upscale=True "
            "enlarges such pictures",
        )

    @cached_property
    def _scales(self) -> tuple[tuple[Bucket, ...], ...]:
        """Still buckets of each scale, largest first, each from tallest to widest."""
        sides = [self.size] if self.upscale else _ladder(self.size, self.multiple)
        return tuple(tuple(_boxes(side, self.multiple, self.max_aspect)) for side in sides)


def fit(pixels: np.ndarray, bucket: Bucket, shown: Size | None = None) -> tuple[np.ndarray, Crop]:
    """The largest centred part of a picture or clip with the bucket's shape, at its size.

    What already has the bucket's size is cut out untouched; the rest is resampled (Lanczos) after
    cropping, so that nothing outside the crop shines in.

    Args:
        pixels: (H, W, 3) or (T, H, W, 3) uint8, as many frames as the bucket has.
        bucket: of `Geometry.choose`.
        shown: height and width at which the original is shown, where its pixels are not square;
            it is resampled once, to the bucket.

    Returns:
        (height, width, 3) or (T, height, width, 3) uint8, and the crop (left, top, right, bottom)
        in pixels of the original, as it is shown.
    """
    frames = pixels[None] if pixels.ndim == 3 else pixels
    assert len(frames) == bucket.frames, f"{len(frames)} frames for bucket {bucket.name}"
    height, width = shown or frames.shape[1:3]
    crop = centred(height, width, bucket)
    rows, down = _span(crop[1], crop[3], frames.shape[1], height)
    columns, across = _span(crop[0], crop[2], frames.shape[2], width)
    window = frames[:, rows, columns]
    if window.shape[1:3] == (bucket.height, bucket.width):
        fitted = window.copy()
    else:
        box = across[0], down[0], across[1], down[1]
        fitted = np.stack([_resize(frame, bucket, box) for frame in window])
    return fitted.reshape(*pixels.shape[:-3], *fitted.shape[1:]), crop


def _ladder(size: int, multiple: int) -> Iterator[int]:
    """Sides of the square buckets, descending to `multiple`: each has half the pixels or less."""
    side = size
    while side >= multiple:
        yield side
        side = math.isqrt(side * side // 2) // multiple * multiple


def _boxes(side: int, multiple: int, max_aspect: float) -> list[Bucket]:
    """For each short side the longest box of at most side^2 pixels; tallest to widest."""
    wide = []
    for short in range(side, 0, -multiple):
        long = side * side // short // multiple * multiple
        if long / short > max_aspect:
            break  # the shorter, the longer
        wide.append(Bucket(short, long))
    return [Bucket(one.width, one.height) for one in reversed(wide[1:])] + wide


def _mismatch(bucket: Bucket, height: int, width: int) -> tuple[float, int]:
    """Ratio of the two aspects, 1 or more; of equals the squarer bucket comes first.

    Products of whole numbers are exact, so that turning both by 90 degrees changes nothing.
    """
    one, other = bucket.height * width, bucket.width * height
    return max(one, other) / min(one, other), max(bucket.height, bucket.width)


def centred(height: int, width: int, bucket: Bucket) -> Crop:
    """The largest part of a picture with the bucket's shape: to the nearest whole pixel of the side
    that is cut."""
    if width * bucket.height > height * bucket.width:
        size = height, _share(height, bucket.width, bucket.height)
    else:
        size = _share(width, bucket.height, bucket.width), width
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return left, top, left + size[1], top + size[0]


def _share(side: int, part: int, whole: int) -> int:
    """side * part / whole, rounded, at least a pixel."""
    return max(1, (2 * side * part + whole) // (2 * whole))


def _span(start: int, end: int, side: int, shown: int) -> tuple[slice, tuple[float, float]]:
    """Of a side shown as `shown` pixels: the own pixels that a part of them touches, and where in
    these it begins and ends."""
    first, last = start * side // shown, -(-end * side // shown)
    return slice(first, last), (start * side / shown - first, end * side / shown - first)


def _resize(
    frame: np.ndarray, bucket: Bucket, box: tuple[float, float, float, float]
) -> np.ndarray:
    size = bucket.width, bucket.height
    return np.array(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, box=box))
