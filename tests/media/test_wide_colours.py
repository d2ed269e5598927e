"""HDR and wide primaries against the standards' own numbers, and films that say they have them."""

import io

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from ldm_core.media.clips import Clip, decode_clip
from ldm_core.media.wide_colours import (
    BT2020,
    HLG,
    P3_D65,
    PEAK,
    PQ,
    UNNAMED,
    WHITE,
    hlg_scene,
    is_wide,
    pq_light,
    pq_signal,
    to_bt709,
    to_srgb,
    tone_map,
)

BT709 = 1
ONE = 65280
CLIP = Clip(0.0, 1, 25)
HDR = [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67]


def srgb_light(level):
    level = np.asarray(level) / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def srgb_signal(light):
    light = np.clip(light, 0, 1)
    bright = 1.055 * light ** (1 / 2.4) - 0.055
    return np.where(light <= 0.0031308, 12.92 * light, bright)


def shown(signal, transfer, primaries):
    """The levels of pixels (..., 3) of a signal 0..1."""
    codes = np.rint(np.asarray(signal) * ONE).astype(np.uint16).reshape(1, -1, 3)
    return to_srgb(codes, transfer, primaries)[0].astype(int)


def grey(signal, transfer):
    return shown(np.repeat(np.asarray(signal)[:, None], 3, axis=1), transfer, BT2020)


def hlg_signal(scene):
    """BT.2100-2, table 5, HLG's OETF."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    dark, bright = np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c
    return np.where(scene <= 1 / 12, dark, bright)


def test_the_curves_go_through_the_points_that_reports_name():
    """BT.2408-7's reference levels: diffuse white, and grey of 18 %, in PQ and in HLG."""
    assert pq_signal(np.array([0.0, 26.0, 203.0, 1000.0, 1e4])) == pytest.approx(
        [0, 0.38, 0.58, 0.75, 1], abs=5e-3
    )
    light = np.array([0.01, 1, 203, 4000])
    assert pq_light(pq_signal(light)) == pytest.approx(light)
    light = PEAK * hlg_scene(np.array([0.0, 0.38, 0.75, 1])) ** 1.2
    assert light == pytest.approx([0, 26, 203, 1000], abs=1.5)
    scene = np.linspace(0, 1, 50)
    assert hlg_scene(hlg_signal(scene)) == pytest.approx(scene, abs=1e-6)


def test_the_roll_off_keeps_the_dark_and_ends_at_white():
    assert tone_map(np.array([0.0, 1, 50, 87])) == pytest.approx([0, 1, 50, 87])
    assert tone_map(np.array([PEAK, 4000.0])) == pytest.approx([WHITE, WHITE])
    light = np.linspace(0, PEAK, 20_000)
    mapped = tone_map(light)
    assert (np.diff(mapped) >= 0).all()
    assert (mapped <= light * (1 + 1e-9) + 1e-9).all()
    slope = np.diff(mapped) / np.diff(light)
    assert np.abs(np.diff(slope)).max() < 0.01  # no corner, at the knee nor elsewhere


@pytest.mark.parametrize("transfer", [PQ, HLG, BT709])
def test_grey_stays_grey_and_more_light_is_never_darker(transfer):
    levels = grey(np.linspace(0, 1, 2001), transfer)
    assert np.ptp(levels, axis=1).max() == 0
    assert (np.diff(levels[:, 0]) >= 0).all()
    assert (levels[0, 0], levels[-1, 0]) == (0, 255)


def test_diffuse_white_is_nearly_white_and_the_dark_keeps_its_level():
    dark = np.array([1.0, 5, 50])
    levels = grey(pq_signal(np.array([*dark, 203, 1000, 1e4])), PQ)[:, 0]
    assert levels.tolist() == [*np.rint(255 * srgb_signal(dark / WHITE)), 229, 255, 255]
    levels = grey([0.1, 0.25, 0.5, 0.75, 1], HLG)[:, 0]
    # FFmpeg 8's scaler, which has no roll-off, gives 16, 61 and 137 too.
    assert levels.tolist() == [16, 61, 137, 229, 255]


def test_the_matrix_is_the_one_of_the_report():
    """ITU-R BT.2407-0: linear BT.2020 -> BT.709."""
    known = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    assert to_bt709(BT2020) == pytest.approx(np.array(known), abs=1e-4)
    assert to_bt709(BT709) == pytest.approx(np.eye(3), abs=1e-12)
    for primaries in (BT2020, P3_D65):
        assert to_bt709(primaries).sum(axis=1) == pytest.approx(1)  # white stays white


@pytest.mark.parametrize("primaries", [BT2020, P3_D65])
@pytest.mark.parametrize("transfer", [PQ, HLG, BT709])
def test_a_colour_that_srgb_has_is_that_colour(transfer, primaries):
    """sRGB -> the wide signal by the standards, as dark as no tone is changed; and back."""
    levels = np.random.default_rng(0).integers(0, 160, (500, 3))
    linear = srgb_light(levels) @ np.linalg.inv(to_bt709(primaries)).T
    display = linear * WHITE
    if transfer == PQ:
        signal = pq_signal(display)
    elif transfer == HLG:
        luminance = (display / PEAK) @ (0.2627, 0.6780, 0.0593)
        signal = hlg_signal(display / PEAK * luminance[:, None] ** (-1 / 6))
    else:
        signal = srgb_signal(linear)
    assert np.abs(shown(signal, transfer, primaries) - levels).max() <= 1


def test_what_names_no_primaries_has_those_of_its_kind():
    colour = [[0.5, 0.3, 0.2]]
    assert (shown(colour, PQ, UNNAMED) == shown(colour, PQ, BT2020)).all()
    assert (shown(colour, PQ, BT709) != shown(colour, PQ, BT2020)).any()
    assert not is_wide(BT709, UNNAMED)
    assert not is_wide(UNNAMED, UNNAMED)
    assert is_wide(HLG, UNNAMED)
    assert is_wide(UNNAMED, P3_D65)


def film(signal, codec, container, pix_fmt, transfer, primaries, matrix=Colorspace.BT2020):
    """A frame of one colour R'G'B' 0..1, by BT.2100's table 6: 10 bits of narrow range."""
    red, green, blue = signal
    kr, kb = (0.2126, 0.0722) if matrix == Colorspace.ITU709 else (0.2627, 0.0593)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = ((blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr)))
    levels = [round(876 * luma + 64), *(round(896 * value + 512) for value in chroma)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=25, options=LOSSLESS.get(codec, {}))
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        frame = av.VideoFrame(64, 64, pix_fmt)
        for plane, level in zip(frame.planes, levels, strict=True):
            plane.update(np.full(plane.buffer_size // 2, level, "<u2").tobytes())
        for tagged in (stream.codec_context, frame):
            tagged.color_range, tagged.color_trc = ColorRange.MPEG, transfer
            tagged.color_primaries = primaries
            if matrix:
                tagged.colorspace = matrix
        frame.pts = 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


LOSSLESS = {
    "libx265": {"x265-params": "lossless=1:bframes=0:log-level=none"},
    "libx264": {"qp": "0"},
}
FILMS = [
    ("libx265", "mp4", "yuv420p10le"),
    ("libx264", "matroska", "yuv444p10le"),
    ("ffv1", "matroska", "yuv422p10le"),
]


@pytest.mark.parametrize(("codec", "container", "pix_fmt"), FILMS)
@pytest.mark.parametrize("transfer", [*HDR, ColorTrc.BT709])
def test_a_film_that_names_its_colours_is_decoded_by_them(codec, container, pix_fmt, transfer):
    signals = [(0.45, 0.45, 0.45), (0.5, 0.35, 0.25), (0.2, 0.4, 0.42), (0.75, 0.75, 0.75)]
    for signal in signals:
        data = film(signal, codec, container, pix_fmt, transfer, ColorPrimaries.BT2020)
        [frame] = decode_clip(data, CLIP)
        expected = shown([signal], int(transfer), BT2020)
        assert np.abs(frame.reshape(-1, 3).astype(int) - expected).max() <= 2, signal


@pytest.mark.parametrize("transfer", HDR)
def test_a_film_that_names_the_transfer_alone_has_the_colours_of_its_kind(transfer):
    signal = (0.5, 0.35, 0.25)
    silent = (ColorPrimaries.UNSPECIFIED, None)
    [frame] = decode_clip(film(signal, "ffv1", "matroska", "yuv444p10le", transfer, *silent), CLIP)
    expected = shown([signal], int(transfer), BT2020)
    assert np.abs(frame.reshape(-1, 3).astype(int) - expected).max() <= 2


def test_a_film_of_srgbs_own_primaries_is_left_as_it_is():
    signal = (0.5, 0.35, 0.25)
    data = film(
        signal, "ffv1", "matroska", "yuv444p10le", ColorTrc.BT709, ColorPrimaries.BT709,
        Colorspace.ITU709,
    )  # fmt: skip
    [frame] = decode_clip(data, CLIP)
    assert np.abs(frame.reshape(-1, 3) - np.array(signal) * 255).max() <= 2
