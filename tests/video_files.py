"""Video files whose every picture tells its number, so that a test sees which frame it got.

A picture has two rows of 16 slots; the white slot of the upper row is the number's low digit,
that of the lower row its high digit. A moving bar, in short, and another one 16 times slower.
"""

import io
import struct
from fractions import Fraction

import av
import numpy as np

SLOTS = 16
CODECS = {"mp4": "libx264", "mov": "mpeg4", "matroska": "libx264", "webm": "libvpx", "avi": "mpeg4"}


def picture(number, width=64, height=48):
    """Picture 0..255, (height, width, 3) uint8."""
    image = np.full((height, width, 3), 30, np.uint8)
    slot, half = width // SLOTS, height // 2
    for row, digit in enumerate((number % SLOTS, number // SLOTS)):
        image[row * half : (row + 1) * half, digit * slot : (digit + 1) * slot] = 225
    return image


def number(image):
    """The number a picture tells; fails where no slot stands out."""
    slot, half = image.shape[1] // SLOTS, image.shape[0] // 2
    digits = []
    for row in range(2):
        band = image[row * half : (row + 1) * half, : slot * SLOTS].astype(float)
        levels = band.reshape(half, SLOTS, slot, 3).mean(axis=(0, 2, 3))
        assert np.sort(levels)[-1] - np.sort(levels)[-2] > 60, levels
        digits.append(int(levels.argmax()))
    return digits[0] + SLOTS * digits[1]


def numbers(images):
    return [number(image) for image in images]


def numbered(count, width=64, height=48):
    return [picture(index, width, height) for index in range(count)]


def encode(
    images,
    container="mp4",
    *,
    codec=None,
    fps=30,
    ticks=None,
    tick=None,
    pix_fmt="yuv420p",
    options=None,
    audio=False,
    gop=None,
    b_frames=None,
    size=None,
    title=None,
    file_options=None,
    pixel_aspect=None,
):
    """A video file's bytes: `images` at `fps`, or each at its own of `ticks` of `tick` seconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=file_options or {}) as file:
        codec = codec or CODECS[container]
        stream = file.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.width, stream.height = size or images[0].shape[1::-1]
        file.metadata.update({"title": title} if title else {})
        stream.pix_fmt = pix_fmt
        stream.bit_rate = 4_000_000
        context = stream.codec_context
        context.time_base = Fraction(tick) if tick else 1 / Fraction(fps)
        if pixel_aspect:
            stream.sample_aspect_ratio = Fraction(pixel_aspect)
        if gop:
            context.gop_size = gop
        if b_frames is not None:
            context.max_b_frames = b_frames
        sound = _add_sound(file, container) if audio else None
        file.start_encoding()
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index if ticks is None else ticks[index]
            frame.time_base = context.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound:
            _mux_sound(file, sound, len(images) / float(fps))
    return buffer.getvalue()


def _add_sound(file, container):
    codec = {"webm": "libopus", "avi": "mp2"}.get(container, "aac")
    return file.add_stream(codec, rate=48_000, layout="mono")


def _mux_sound(file, stream, seconds):
    for start in range(0, int(48_000 * seconds), 960):
        samples = np.zeros((1, 960), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


# Clockwise degrees -> (a, b, c, d): point (p, q) is shown at (a p + c q, b p + d q), q downwards.
TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def turned(data, clockwise):
    """An mp4 or mov whose track header turns the picture by that many degrees."""
    a, b, c, d = (value << 16 for value in TURNS[clockwise])
    place = data.index(b"tkhd") + 44  # version 0
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + len(matrix) :]


def with_duration(data, container, factor):
    """The file with the length in its headers multiplied, the frames untouched."""
    changed = bytearray(data)
    for mark, offset, form in LENGTHS[container]:
        place = data.index(mark) + offset
        (length,) = struct.unpack_from(form, data, place)
        assert length > 0
        struct.pack_into(form, changed, place, type(length)(length * factor))
    return bytes(changed)


# Container -> (mark, where after it, how) a length is written.
_ISO_LENGTHS = [(b"mvhd", 20, ">I"), (b"tkhd", 24, ">I"), (b"mdhd", 20, ">I")]
_EBML_LENGTHS = [(b"\x44\x89\x88", 3, ">d")]
LENGTHS = {
    "mp4": _ISO_LENGTHS,
    "mov": _ISO_LENGTHS,
    "matroska": _EBML_LENGTHS,
    "webm": _EBML_LENGTHS,
    "avi": [(b"avih", 24, "<I"), (b"strh", 40, "<I")],
}
