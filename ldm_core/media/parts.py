"""A file's parts, which become rows of the store: a picture is one, a video one for each clip.

Both functions take bytes and give plain values, so that they can be called in a child process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ldm_core.errors import BadMedia
from ldm_core.media.buckets import Bucket, Crop, Geometry, Size, centred, fit
from ldm_core.media.clips import Clip, cut_clips, decode_fitted
from ldm_core.media.decode import decode_image, image_size
from ldm_core.media.video import probe_video, scene_changes


@dataclass(frozen=True)
class ClipRule:
    """How videos are cut; see `cut_clips`."""

    fps: float
    frames: int
    stride: int | None
    multiple: int
    cut_at_scenes: bool


@dataclass(frozen=True)
class Part:
    """Where a part is in its file, and the bucket it goes to; a picture has no clip."""

    bucket: str
    clip: Clip | None = None


@dataclass(frozen=True)
class Pixels:
    """A decoded part.

    Attributes:
        frames: (T, h, w, 3) uint8 of the bucket's size.
        crop: left, top, right, bottom in pixels of the file's upright picture.
        height, width: of the file's upright picture; of a video as it is shown, in square pixels.
    """

    frames: np.ndarray
    crop: Crop
    height: int
    width: int


def find_parts(
    data: bytes, kind: str, geometry: Geometry, rule: ClipRule, seconds: float
) -> list[Part]:
    """The parts of a picture or video, at least one; a video may take `seconds`.

    Raises:
        BadMedia: as `image_size`, `probe_video`, `scene_changes` and `Geometry.choose` do.
    """
    if kind == "image":
        return [Part(geometry.choose(*image_size(data)).name)]
    facts = probe_video(data, seconds=seconds)
    scenes = scene_changes(data, seconds=seconds) if rule.cut_at_scenes else ()
    clips = cut_clips(facts, rule.fps, rule.frames, rule.stride, scenes, rule.multiple)
    return [
        Part(geometry.choose(facts.height, facts.width, clip.frames).name, clip) for clip in clips
    ]


def decode_parts(
    data: bytes, kind: str, clips: Sequence[Clip | None], bucket: str, seconds: float
) -> list[Pixels | BadMedia]:
    """Some parts of one file, all of one bucket: each as pixels, or as what is wrong with it.

    Args:
        data: the whole file.
        kind: "image" or "video".
        clips: of a video, by start; one None for a picture.
        bucket: its name.
        seconds: that a video may take.
    """
    size = Bucket.parse(bucket)
    found: list[Pixels | BadMedia] = []
    try:
        if kind == "image":
            return [_fitted(decode_image(data)[None], size)]
        still, named = replace(size, frames=1), [clip for clip in clips if clip]
        fitted = partial(_fitted_frame, still)
        for part in decode_fitted(data, named, fitted, seconds=seconds):
            crop = centred(part.height, part.width, size)
            found.append(Pixels(part.frames, crop, part.height, part.width))
    except BadMedia as error:  # earlier clips lie before the damage
        found += [error] * (len(clips) - len(found))
    return found


def _fitted_frame(bucket: Bucket, frame: np.ndarray, shown: Size) -> np.ndarray:
    return fit(frame, bucket, shown)[0]


def _fitted(frames: np.ndarray, bucket: Bucket) -> Pixels:
    height, width = frames.shape[1:3]
    fitted, crop = fit(frames, bucket)
    return Pixels(fitted, crop, height, width)
