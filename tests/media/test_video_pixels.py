import io

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from video_files import encode, numbered, numbers, turned

from ldm_core.media.clips import Clip, decode_clip
from ldm_core.media.video import probe_video

CONTAINERS = ["mp4", "mov", "matroska", "webm", "avi"]


@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_rotation_metadata_is_applied(container, clockwise):
    """A camera held askew stores frames turned one way and a matrix that turns them back."""
    stored = [np.rot90(image, clockwise // 90) for image in numbered(20)]
    data = turned(encode(stored, container), clockwise)
    facts = probe_video(data)
    assert (facts.width, facts.height) == (64, 48)
    frames = decode_clip(data, Clip(0.0, 20, 30))
    assert frames.shape == (20, 48, 64, 3)
    assert numbers(frames) == list(range(20))


@pytest.mark.parametrize("container", CONTAINERS)
def test_sound_is_ignored(container):
    data = encode(numbered(30), container, audio=True)
    facts = probe_video(data)
    assert facts.has_audio
    assert facts.frames == 30
    assert facts.seconds == pytest.approx(1.0, abs=2e-3)
    assert numbers(decode_clip(data, Clip(0.0, 30, 30))) == list(range(30))


@pytest.mark.parametrize(
    ("pix_fmt", "size"),
    [
        ("yuv420p", (63, 47)),
        ("yuv444p", (63, 47)),
        ("yuv420p10le", (64, 48)),
        ("yuv422p10le", (62, 49)),
        ("yuv410p", (63, 47)),
    ],
)
def test_odd_sizes_and_deep_pixels(pix_fmt, size):
    width, height = size
    images = numbered(20, width, height)
    data = encode(images, "matroska", pix_fmt=pix_fmt, codec="ffv1")
    assert (probe_video(data).width, probe_video(data).height) == size
    frames = decode_clip(data, Clip(0.0, 20, 30))
    assert frames.shape == (20, height, width, 3)
    assert numbers(frames) == list(range(20))
    assert np.abs(frames.astype(int) - np.stack(images)).mean() < 6


@pytest.mark.parametrize("name", ["ITU709", "ITU601", None])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("height", [48, 720])
def test_colours_by_the_closed_form(name, full, height):
    """Y'CbCr by the standards' own formulas; without a name it is 709 in HD, 601 below."""
    red, green, blue = (200, 60, 40)
    hd = name == "ITU709" or (name is None and height == 720)
    kr, kb = (0.2126, 0.0722) if hd else (0.299, 0.114)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = ((blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr)))
    if full:
        levels = [luma, *(128 + value for value in chroma)]
    else:
        levels = [16 + luma * 219 / 255, *(128 + value * 224 / 255 for value in chroma)]
    planes = np.stack([np.full((height, 64), round(level), np.uint8) for level in levels])
    data = encode_planes(planes, name, full)
    decoded = decode_clip(data, Clip(0.0, 1, 25))
    assert np.abs(decoded.astype(int) - (red, green, blue)).max() <= 3


def encode_planes(planes, name, full):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("libx264", rate=25, options={"qp": "0"})
        _, stream.height, stream.width = planes.shape
        stream.pix_fmt = "yuv444p"
        context = stream.codec_context
        context.color_range = ColorRange.JPEG if full else ColorRange.MPEG
        frame = av.VideoFrame.from_ndarray(planes, format="yuv444p", channel_last=False)
        frame.color_range = context.color_range
        if name:
            context.colorspace = frame.colorspace = Colorspace[name]
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()
