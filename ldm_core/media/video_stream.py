"""A stranger's video file, as bytes -> packets and frames of its one video stream.

The file is never a path or an address, the parser is chosen by the first bytes and not by
FFmpeg's guess, and no parser may open anything else: a playlist cannot make this read a file.
"""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import av
from av.stream import Disposition

from ldm_core.errors import BadMedia
from ldm_core.media.video_container import check_container
from ldm_core.media.video_geometry import shown_width

# Listed, so that no rarely used decoder of FFmpeg's ever sees a stranger's file.
CODECS = {
    *("av1", "h264", "hevc", "mjpeg", "vp8", "vp9"),
    *("h261", "h263", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v2", "msmpeg4v3", "theora"),
    *("svq3", "vc1", "wmv1", "wmv2", "wmv3"),
    *("dnxhd", "ffv1", "ffvhuff", "huffyuv", "png", "prores", "rawvideo", "utvideo"),
}
MAX_FRAME_PIXELS = 8192 * 4320
TIME_BUDGET = 600.0
# Times are compared to a millisecond: Matroska rounds to it, so 2/30 s is written as 0.067.
CLOCK_ERROR = 1e-3

T = TypeVar("T")


class TimedFrame(NamedTuple):
    """A frame as coded, its seconds since the file's first one, its pixels' width over height."""

    time: float
    frame: av.VideoFrame
    pixel_aspect: Fraction


class VideoStream:
    """The video stream of one open file; `open_video` makes it.

    Attributes:
        container: the parser in use: "mp4", "matroska" or "avi".
        codec: the stream's codec, e.g. "h264".
        has_audio: whether the file has an audio stream too.
        tick: seconds of one unit of the timestamps.
        pixel_aspect: width over height of a pixel; 1 where the file does not say.
    """

    def __init__(self, file: Any, stream: Any, container: str, seconds: float) -> None:
        self._file, self._stream = file, stream
        self._seconds, self._left = seconds, seconds
        self.container = container
        self.codec = stream.codec_context.codec.canonical_name
        self.has_audio = len(file.streams.audio) > 0
        self.tick = float(stream.time_base)
        self.pixel_aspect = _pixel_aspect(stream)

    def packets(self) -> Iterator[av.Packet]:
        """The stream's packets from here on; the last one is empty and flushes the decoder."""
        packets = self._file.demux(self._stream)
        while (packet := self._timed(lambda: next(packets, None))) is not None:
            yield packet

    def decode(self, packet: av.Packet) -> list[tuple[int, av.VideoFrame]]:
        """(timestamp in ticks, frame) of what `packet` completes, in the order of showing."""
        frames = self._timed(packet.decode)
        return [(frame.pts, frame) for frame in frames if frame.pts is not None]

    def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """(timestamp, frame) from here on, in the order of showing."""
        for packet in self.packets():
            yield from self.decode(packet)

    def frames_from_key(self, pts: int) -> Iterator[tuple[int, av.VideoFrame]] | None:
        """Frames from the last key frame at or before `pts` on; None if the index has none."""
        try:
            self._file.seek(pts, stream=self._stream)
        except av.FFmpegError:
            return None
        frames = self.frames()
        first = next(frames, None)
        return None if first is None or first[0] > pts else chain([first], frames)

    def _timed(self, work: Callable[[], T]) -> T:
        """Run the parser on the clock; what the caller does between two calls is not counted."""
        started = time.monotonic()
        result = work()
        self._left -= time.monotonic() - started
        if self._left < 0:
            raise BadMedia("decode", "timeout", f"more than {self._seconds:g} s")
        return result


@contextmanager
def open_video(
    data: bytes, *, max_pixels: int, seconds: float, threads: int = 1
) -> Iterator[VideoStream]:
    """Open a video file's bytes; inside the `with`, every error of the parser is a BadMedia.

    Args:
        data: the whole file.
        max_pixels: a frame may have at most this many.
        seconds: of reading and decoding, after which "timeout" is raised.
        threads: of the decoder.

    Raises:
        BadMedia: stage "decode"; reason "empty file", "not a video", "no video stream",
            "no frames", "too large", "truncated", "timeout" or "undecodable".
    """
    container = check_container(data)
    try:
        with _open(data, container, max_pixels, seconds) as file:
            stream = _video_stream(file, max_pixels)
            stream.codec_context.thread_count = threads
            # A later frame may be larger than the first.
            stream.codec_context.options = _decoder_bound(max_pixels)
            yield VideoStream(file, stream, container, seconds)
    except BadMedia:
        raise
    except av.ExitError as error:
        raise BadMedia("decode", "timeout", f"more than {seconds:g} s") from error
    except EOFError as error:  # a whole file whose headers are followed by nothing
        raise BadMedia("decode", "no frames") from error
    except Exception as error:  # a damaged file can make a parser raise anything
        raise BadMedia("decode", "undecodable", f"{type(error).__name__}: {error}") from error


def timed_frames(
    data: bytes, start_s: float, *, max_pixels: int, seconds: float, threads: int = 1
) -> Iterator[TimedFrame]:
    """Frames from the last key frame at or before `start_s` on, in the order of showing.

    Earlier frames are not decoded if the file's index leads there; where it misleads, decoding
    starts from the beginning.

    Raises:
        BadMedia: as `open_video` does.
    """
    limits: dict[str, Any] = {"max_pixels": max_pixels, "seconds": seconds, "threads": threads}
    with open_video(data, **limits) as video:
        frames = video.frames()
        if (first := next(frames, None)) is None:
            raise BadMedia("decode", "no frames")
        origin = first[0]
        near: Iterator[tuple[int, av.VideoFrame]] | None = chain([first], frames)
        if start_s > 0:
            near = video.frames_from_key(origin + int((start_s + CLOCK_ERROR) / video.tick))
        for pts, frame in near or ():
            yield TimedFrame((pts - origin) * video.tick, frame, video.pixel_aspect)
    if near is None:
        yield from timed_frames(data, 0.0, **limits)


def _open(data: bytes, container: str, max_pixels: int, seconds: float) -> Any:
    return av.open(
        io.BytesIO(data),
        mode="r",
        format=container,
        options=_decoder_bound(max_pixels),  # opening may decode a frame
        metadata_errors="replace",  # a title may be in any encoding
        timeout=seconds,
        io_open=_refuse,
    )


def _decoder_bound(max_pixels: int) -> dict[str, str]:
    """Decoders count a frame with its padding: twice the pixels, and more for a small one."""
    return {"max_pixels": str(2 * max_pixels + (1 << 16))}


def _refuse(url: str, flags: int, options: dict) -> None:
    raise PermissionError("a video file may not open another one")


def _video_stream(file: Any, max_pixels: int) -> Any:
    """The stream to decode: FFmpeg's choice, unless it is a sound file's cover picture."""
    stream = file.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise BadMedia("decode", "no video stream")
    context = stream.codec_context
    codec = "unknown" if context is None else context.codec.canonical_name
    if codec not in CODECS:
        raise BadMedia("decode", "undecodable", f"codec {codec}; read: {', '.join(sorted(CODECS))}")
    # A decoder that refuses the size while the file is opened leaves none.
    shown = shown_width(context.width, _pixel_aspect(stream))
    if not 0 < max(context.width, shown) * context.height <= max_pixels:
        size = f"{shown} x {context.height}" if context.width else "a frame"
        raise BadMedia("decode", "too large", f"{size} is more than {max_pixels} pixels")
    return stream


def _pixel_aspect(stream: Any) -> Fraction:
    """Of the file's headers or, where they are silent, of the codec's."""
    return Fraction(stream.sample_aspect_ratio or 1)
