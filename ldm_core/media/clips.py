"""A video -> clips of equal length at one rate; and the frames of a clip."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from ldm_core.errors import BadMedia, UserError
from ldm_core.media.buckets import Bucket, Size, fit
from ldm_core.media.video import VideoFacts
from ldm_core.media.video_geometry import shown_size
from ldm_core.media.video_pixels import upright_srgb
from ldm_core.media.video_stream import (
    CLOCK_ERROR,
    MAX_FRAME_PIXELS,
    TIME_BUDGET,
    TimedFrame,
    timed_frames,
)

_ROUNDING = 1e-6  # of a frame: 3 s at 8 frames a second are 24 frames, not 25


@dataclass(frozen=True)
class Clip:
    """`frames` moments start_s, start_s + 1/fps, ... in seconds since the first frame."""

    start_s: float
    frames: int
    fps: float

    @property
    def name(self) -> str:
        """Start, frames and rate, e.g. "t=3.000+17@8"."""
        return f"t={self.start_s:.3f}+{self.frames}@{self.fps:g}"

    def times(self) -> list[float]:
        """The seconds of its frames."""
        return [self.start_s + index / self.fps for index in range(self.frames)]


def cut_clips(
    facts: VideoFacts,
    fps: float,
    frames: int,
    stride: int | None = None,
    scenes: Sequence[float] = (),
    multiple: int = 4,
) -> list[Clip]:
    """Cut a whole video into clips, in order of time.

    The video is cut into shots at `scenes`. A shot from a to b is sampled at a, a + 1/fps, ...
    as long as the moment lies before b. Of these n moments, clips of `frames` begin at moment
    0, stride, 2 stride, ... while so many are left. If any remain after the last of them, one
    more clip begins at the next multiple of the stride and has 1 + multiple * k frames, as
    many as there are left. So at most `multiple` - 1 moments at a shot's end go unused, and a
    shot shorter than one clip, even than one frame, gives one clip.

    Args:
        facts: of the video, from `probe_video`.
        fps: frames per second of the clips; more than the video has repeats frames.
        frames: of a full clip, 1 + multiple * k.
        stride: moments between the beginnings of two clips; `frames` without overlap if None.
            A larger one leaves the moments between unused.
        scenes: seconds at which a shot ends and the next begins; no clip crosses one.
        multiple: of frames per latent step after the first; 1 allows any length.

    Raises:
        UserError: fps, stride or multiple not positive, or `frames` not 1 + multiple * k.
    """
    stride = frames if stride is None else stride
    _check(fps, frames, stride, multiple)
    cuts = sorted({scene for scene in scenes if 0 < scene < facts.seconds})
    clips = []
    for start, end in pairwise([0.0, *cuts, facts.seconds]):
        moments = max(1, math.ceil((end - start) * fps - _ROUNDING))
        for first, length in _spans(moments, frames, stride, multiple):
            clips.append(Clip(start + first / fps, length, fps))
    return clips


def decode_clip(
    data: bytes,
    clip: Clip,
    *,
    threads: int = 1,
    max_pixels: int = MAX_FRAME_PIXELS,
    seconds: float = TIME_BUDGET,
) -> np.ndarray:
    """The frames of one clip, (T, H, W, 3) uint8; see `decode_clips`."""
    limits: dict[str, Any] = {"threads": threads, "max_pixels": max_pixels, "seconds": seconds}
    return next(decode_clips(data, [clip], **limits))


def decode_clips(
    data: bytes,
    clips: Sequence[Clip],
    *,
    threads: int = 1,
    max_pixels: int = MAX_FRAME_PIXELS,
    seconds: float = TIME_BUDGET,
) -> Iterator[np.ndarray]:
    """The frames of several clips of one video, (T, H, W, 3) uint8 RGB each; see
    `decode_fitted`."""
    limits: dict[str, Any] = {"threads": threads, "max_pixels": max_pixels, "seconds": seconds}
    for found in decode_fitted(data, clips, _whole, **limits):
        yield found.frames


@dataclass(frozen=True)
class Fitted:
    """A decoded clip.

    Attributes:
        frames: (T, h, w, 3) uint8 RGB of the size that was asked for.
        height, width: of the video's upright picture, as it is shown.
    """

    frames: np.ndarray
    height: int
    width: int


def decode_fitted(
    data: bytes,
    clips: Sequence[Clip],
    fit: Callable[[np.ndarray, Size], np.ndarray],
    *,
    threads: int = 1,
    max_pixels: int = MAX_FRAME_PIXELS,
    seconds: float = TIME_BUDGET,
) -> Iterator[Fitted]:
    """The frames of several clips of one video, in one pass, each fitted when it is decoded.

    A moment's frame is the last one shown at or before it, to a millisecond. Frames are turned
    upright by their metadata; where pixels are not square, they are to be shown at another size
    than they have. Decoding begins at the key frame before the first clip; only
    frames that a clip needs are converted, and of those that are fitted only unfinished clips are
    held: a clip of 93 frames of 3840 x 2160 pixels would be 2.3 GB.

    Args:
        data: the whole file.
        clips: by start.
        fit: makes of an upright frame (H, W, 3), and the height and width it is to be shown at,
            one of (h, w, 3), the same for all frames of a size.
        threads: of the decoder.
        max_pixels: a frame may have at most this many.
        seconds: of reading and decoding, the caller's own time not counted.

    Raises:
        BadMedia: as `probe_video` does, when the damage is reached: earlier clips have been
            yielded by then. "undecodable" too if a clip's frame is missing or damaged.
        ValueError: clips not in the order of their starts.
    """
    if any(late.start_s < early.start_s for early, late in pairwise(clips)):
        raise ValueError("clips must be in the order of their starts")
    if not clips:
        return
    moments = deque(sorted((time, i) for i, clip in enumerate(clips) for time in clip.times()))
    parts = [_Unfinished(clip.frames) for clip in clips]
    limits: dict[str, Any] = {"threads": threads, "max_pixels": max_pixels, "seconds": seconds}
    done, damaged, converter = 0, False, VideoReformatter()
    for until, (_, frame, aspect) in _on_screen(timed_frames(data, moments[0][0], **limits)):
        shown: tuple[np.ndarray, Size] | None = None
        # Later frames are made from a damaged one, up to the next key frame.
        damaged = frame.is_corrupt or (damaged and not frame.key_frame)
        while moments and moments[0][0] < until:
            if damaged:
                raise BadMedia("decode", "undecodable", f"damage at {moments[0][0]:.3f} s")
            if shown is None:
                size = shown_size(frame, aspect)
                shown = fit(upright_srgb(frame, converter), size), size
            parts[moments.popleft()[1]].add(*shown)
        while done < len(clips) and parts[done].missing == 0:
            yield parts[done].whole()
            done += 1
        if done == len(clips):
            return
    late = f"no frame at {moments[0][0]:.3f} s: the video ends before"
    raise BadMedia("decode", "undecodable", late)


def _check(fps: float, frames: int, stride: int, multiple: int) -> None:
    if not 0 < fps < math.inf:
        raise UserError(f"fps is {fps}; expected a positive number, such as 8")
    if multiple < 1:
        raise UserError(f"multiple is {multiple}; expected 1 or more")
    if frames < 1 or (frames - 1) % multiple:
        near = 1 + multiple * max(0, round((frames - 1) / multiple))
        raise UserError(f"frames is {frames}; expected 1 + {multiple} k, such as {near}")
    if stride < 1:
        raise UserError(f"stride is {stride}; expected 1 or more")


def _spans(moments: int, frames: int, stride: int, multiple: int) -> Iterator[tuple[int, int]]:
    """(first moment, length) of each clip of a shot; the rule is `cut_clips`'s."""
    covered = 0
    for first in range(0, moments, stride):
        left = moments - first
        length = frames if left >= frames else 1 + (left - 1) // multiple * multiple
        if first + length > covered:  # an overlapping rest may hold nothing new
            yield first, length
        if length < frames:
            return
        covered = first + length


def _on_screen(frames: Iterator[TimedFrame]) -> Iterator[tuple[float, TimedFrame]]:
    """(until when, frame): a frame stays until the next one, the last for its own duration."""
    held = None
    for timed in frames:
        if held is not None:
            yield timed.time - CLOCK_ERROR, held
        held = timed
    if held is not None:
        # A last frame that does not say how long it stays, stays.
        ticks, tick = held.frame.duration, held.frame.time_base
        lasts = float(ticks * tick) if ticks and tick else math.inf
        yield held.time + lasts + CLOCK_ERROR, held


def _whole(frame: np.ndarray, size: Size) -> np.ndarray:
    """The frame as it is shown."""
    return fit(frame, Bucket(*size), size)[0]


class _Unfinished:
    """A clip whose frames come one by one; they have their place from the first on."""

    def __init__(self, frames: int) -> None:
        self.missing = self._count = frames
        self._frames: np.ndarray | None = None
        self._size = (0, 0)

    def add(self, frame: np.ndarray, size: Size) -> None:
        """Add the next frame, of a picture of this height and width."""
        if self._frames is None:
            self._frames = np.empty((self._count, *frame.shape), np.uint8)
            self._size = size
        if self._size != size:
            both = sorted({self._size, size})
            raise BadMedia("decode", "undecodable", f"frames of {both[0]} and {both[1]} pixels")
        self._frames[self._count - self.missing] = frame
        self.missing -= 1

    def whole(self) -> Fitted:
        """The finished clip, which is no longer held here."""
        assert self._frames is not None
        frames, self._frames = self._frames, None
        return Fitted(frames, *self._size)
