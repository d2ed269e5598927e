"""What a video file holds, by its packets and not by its header; and where its scenes change."""

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ldm_core.errors import BadMedia
from ldm_core.media.video_geometry import shown_size
from ldm_core.media.video_stream import (
    CLOCK_ERROR,
    MAX_FRAME_PIXELS,
    TIME_BUDGET,
    VideoStream,
    open_video,
    timed_frames,
)

MAX_SECONDS = 4 * 3600.0
SCENE_THRESHOLD = 0.1  # of the full range; cuts of films measure 0.1 to 0.5, motion below 0.05


@dataclass(frozen=True)
class VideoFacts:
    """One video file, measured.

    Attributes:
        width: of the upright picture, in square pixels as it is shown.
        height: of the upright picture, in square pixels as it is shown.
        frames: packets of the video stream that are shown.
        seconds: from the first frame's appearance to the last one's end.
        fps: frames / seconds.
        variable_rate: whether frames stay for unequal times, beyond a clock's rounding.
        container: "mp4" (mp4, mov), "matroska" (mkv, webm) or "avi".
        codec: e.g. "h264".
        has_audio: whether there is an audio stream, which is not read.
    """

    width: int
    height: int
    frames: int
    seconds: float
    fps: float
    variable_rate: bool
    container: str
    codec: str
    has_audio: bool


def probe_video(
    data: bytes,
    *,
    max_pixels: int = MAX_FRAME_PIXELS,
    max_seconds: float = MAX_SECONDS,
    seconds: float = TIME_BUDGET,
) -> VideoFacts:
    """Read all packets of a video file's bytes and decode its first frame.

    Args:
        data: the whole file.
        max_pixels: a frame may have at most this many.
        max_seconds: the video may last at most this long.
        seconds: of work, after which "timeout" is raised.

    Raises:
        BadMedia: stage "decode"; reason "empty file", "not a video", "no video stream",
            "no frames", "too large", "too long", "truncated", "timeout" or "undecodable".
    """
    with open_video(data, max_pixels=max_pixels, seconds=seconds) as video:
        first, times, lasts = _timeline(video)
        if lasts > max_seconds:
            raise BadMedia("decode", "too long", f"{lasts:.1f} s is more than {max_seconds:g} s")
        height, width = shown_size(first, video.pixel_aspect)
        return VideoFacts(
            width=width,
            height=height,
            frames=len(times),
            seconds=lasts,
            fps=len(times) / lasts,
            variable_rate=_uneven(times),
            container=video.container,
            codec=video.codec,
            has_audio=video.has_audio,
        )


def scene_changes(
    data: bytes,
    threshold: float = SCENE_THRESHOLD,
    *,
    max_pixels: int = MAX_FRAME_PIXELS,
    seconds: float = TIME_BUDGET,
) -> list[float]:
    """Seconds at which the picture jumps to another one, for `cut_clips`.

    Frames are shrunk to 32 x 32 RGB. The difference between two neighbours is the mean absolute
    one, 0 to 1. A scene changes where it is at least `threshold` and twice each of the
    differences just before and just after: fast motion differs much in a row, and a single
    flash twice in a row, so neither counts. Fades are not found.

    Raises:
        BadMedia: as `probe_video` does, without "too long".
    """
    times, differences, last, converter = [], [], None, VideoReformatter()
    for time, frame, _ in timed_frames(data, 0.0, max_pixels=max_pixels, seconds=seconds):
        shrunk = converter.reformat(frame, 32, 32, "rgb24", threads=1)
        small = shrunk.to_ndarray().astype(np.int16)
        if last is not None:
            times.append(time)
            differences.append(float(np.abs(small - last).mean()) / 255)
        last = small
    padded = np.array([0.0, *differences, 0.0])
    neighbours = np.maximum(padded[:-2], padded[2:])
    jumps = (padded[1:-1] >= threshold) & (padded[1:-1] >= 2 * neighbours)
    return [time for time, jump in zip(times, jumps, strict=True) if jump]


def _timeline(video: VideoStream) -> tuple[av.VideoFrame, list[float], float]:
    """(the first frame, every packet's time in order, from the first frame to the end), seconds."""
    decoded: list[tuple[int, av.VideoFrame]] = []
    shown = []
    for packet in video.packets():
        if not decoded:  # an undecodable beginning is worth knowing; decoding all is too much
            decoded = video.decode(packet)
        pts = packet.dts if packet.pts is None else packet.pts
        if pts is not None and not packet.is_discard:
            shown.append((pts * video.tick, (packet.duration or 0) * video.tick))
    if not decoded or not shown:
        raise BadMedia("decode", "no frames")
    origin, first = decoded[0]
    times = sorted(time for time, _ in shown)
    last, lasts = max(shown)
    return first, times, last + (lasts or _usual_gap(times)) - origin * video.tick


def _usual_gap(times: list[float]) -> float:
    """How long the last frame stays when the file does not say: as long as the average one."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1 / 25


def _uneven(times: list[float]) -> bool:
    """Whether the gaps differ by more than a tenth of them and more than the clock's rounding."""
    gaps = np.diff(times)
    return len(gaps) > 0 and bool(np.ptp(gaps) > max(2 * CLOCK_ERROR, 0.1 * gaps.mean()))
