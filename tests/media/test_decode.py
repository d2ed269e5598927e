import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ldm_core.errors import BadMedia
from ldm_core.media.decode import FORMATS, decode_image, fit_to_square, image_size
from ldm_core.media.pixels import to_image, to_pixels

RAMP = np.linspace(0, 255, 24 * 16 * 3).reshape(16, 24, 3).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "WEBP"])
def test_lossless_formats_keep_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(encoded(Image.fromarray(RAMP), kind, **options)), RAMP)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in ("JPEG", "AVIF")])
def test_lossy_formats_come_close(kind):
    decoded = decode_image(encoded(Image.fromarray(RAMP), kind, quality=95))
    assert abs(decoded.astype(int) - RAMP).mean() < 4


# What sets a stored picture upright, by EXIF 2.32, section 4.6.4 A: 274.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        *([("AVIF", {"quality": 95})] if "AVIF" in FORMATS else []),
    ],
)
def test_a_picture_is_set_upright_once_and_its_header_tells_that_size(kind, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    slope = np.mgrid[:16, :24, :3].transpose(1, 2, 3, 0) @ (3, 7, 20)  # differs from each turn
    stored = slope.astype(np.uint8)
    data = encoded(Image.fromarray(stored), kind, exif=exif, **options)
    upright = UPRIGHT[orientation](stored)
    decoded = decode_image(data)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() <= (8 if kind in ("JPEG", "AVIF") else 0)
    assert image_size(data) == upright.shape[:2]


def test_transparency_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (255, 0, 0, 128)
    expected = [[[255, 0, 0], [255, 127, 127]], [[255, 255, 255], [255, 255, 255]]]
    assert np.array_equal(decode_image(encoded(Image.fromarray(rgba), "PNG")), expected)


def test_palette_with_alpha():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 10, 200, 30, 5, 5, 250])
    image.putdata([0, 1, 2])
    data = encoded(image, "PNG", transparency=bytes([0, 255, 255]))
    assert decode_image(data).tolist() == [[[255] * 3, [10, 200, 30], [5, 5, 250]]]


def test_grey_with_alpha():
    image = Image.merge("LA", (Image.new("L", (2, 2), 40), Image.new("L", (2, 2), 255)))
    assert (decode_image(encoded(image, "PNG")) == 40).all()


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = decode_image(encoded(Image.fromarray(levels), kind))
        assert decoded[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_float_grey_is_scaled_by_its_range():
    for scale in (1.0, 255.0, 65535.0):
        levels = np.array([[0, 0.5, 1]], np.float32) * scale
        decoded = decode_image(encoded(Image.fromarray(levels), "TIFF"))
        assert decoded[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(BadMedia, match="undecodable"):
        decode_image(encoded(Image.fromarray(np.array([[-1, np.nan]], np.float32)), "TIFF"))


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    red, green, blue = decode_image(encoded(image, "JPEG", quality=95))[8, 8]
    assert red > 240
    assert max(green, blue) < 15


def test_embedded_profile_is_converted():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    # An sRGB profile whose red and blue primaries are exchanged names exchanged colours.
    swapped = bytearray(lab.tobytes())
    red, blue = swapped.index(b"rXYZ"), swapped.index(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    swapped = bytes(swapped).replace(b"s\0R\0G\0B", b"s\0W\0A\0P")
    image = Image.new("RGB", (4, 4), (220, 40, 60))
    converted = decode_image(encoded(image, "PNG", icc_profile=swapped))
    assert abs(converted[0, 0].astype(int) - (60, 40, 220)).max() <= 2


@pytest.mark.parametrize("profile", [b"not a profile", b"\0" * 200])
def test_an_unreadable_profile_leaves_the_pixels(profile):
    data = encoded(Image.fromarray(RAMP), "PNG", icc_profile=profile)
    assert np.array_equal(decode_image(data), RAMP)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_half_a_file_is_truncated(kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(BadMedia) as caught:
        decode_image(data[: len(data) * 2 // 3])
    assert (caught.value.stage, caught.value.reason) == ("decode", "truncated")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"just some words, named .png by mistake", "not an image"),
        (b"P6 2 2 255 ............", "not an image"),  # a format that is not listed
    ],
)
def test_what_is_no_picture_says_so(data, reason):
    with pytest.raises(BadMedia) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_a_pixel_bomb_is_refused_before_it_is_decoded():
    data = encoded(Image.new("1", (20_000, 5_000)), "PNG")
    with pytest.raises(BadMedia, match="20000 x 5000 is more than 64000000 pixels"):
        decode_image(data)
    assert len(data) < 100_000


def test_damaged_files_raise_bad_media_and_nothing_else():
    rng = np.random.default_rng(1)
    for kind in FORMATS:
        data = encoded(Image.fromarray(RAMP), kind)
        for _ in range(40):
            damaged = bytearray(data)
            for position in rng.integers(4, len(data), size=6):
                damaged[position] = rng.integers(256)
            try:
                picture = decode_image(bytes(damaged), max_pixels=100_000)
            except BadMedia:
                continue
            assert picture.ndim == 3
            assert picture.dtype == np.uint8


def test_exact_size_is_untouched():
    square = RAMP[:, :16]
    fitted, crop = fit_to_square(square, 16)
    assert np.array_equal(fitted, square)
    assert crop == (0, 0, 16, 16)


@pytest.mark.parametrize(
    ("height", "width", "crop"),
    [(100, 40, (0, 30, 40, 70)), (31, 90, (29, 0, 60, 31)), (7, 8, (0, 0, 7, 7))],
)
def test_crop_boxes_are_in_original_pixels(height, width, crop):
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = crop
    image[top:bottom, left:right] = 200
    fitted, box = fit_to_square(image, 16)
    assert box == crop
    assert fitted.shape == (16, 16, 3)
    assert (fitted == 200).all()  # nothing from outside the crop bleeds in


def test_shrinking_averages():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    fitted, _ = fit_to_square(np.repeat(board[..., None], 3, axis=2).astype(np.uint8), 16)
    assert abs(fitted.astype(int) - 128).max() < 10


def test_pixels_round_trip():
    pixels = to_pixels(RAMP)
    assert pixels.shape == (3, 16, 24)
    assert pixels.dtype == torch.float32
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
    assert np.array_equal(to_image(pixels), RAMP)
    assert np.array_equal(to_image(torch.stack([pixels, pixels])), np.stack([RAMP, RAMP]))


def test_pixels_out_of_range_are_clamped():
    assert to_image(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)).tolist() == [[[0, 128, 255]]]
