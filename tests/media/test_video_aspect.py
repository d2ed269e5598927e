"""Videos whose pixels are not square, as broadcasts, DVDs and camcorders have them."""

from fractions import Fraction

import numpy as np
import pytest
from video_files import encode, numbered, numbers, turned

from ldm_core.errors import BadMedia
from ldm_core.media.buckets import Bucket, Geometry, fit
from ldm_core.media.clips import Clip, decode_clip
from ldm_core.media.parts import ClipRule, decode_parts, find_parts
from ldm_core.media.video import probe_video

RULE = ClipRule(fps=8, frames=5, stride=None, multiple=4, cut_at_scenes=False)


def disc(height, width, aspect):
    """A picture (height, width, 3) whose pixels are `aspect` wide, with a disc of a third of it."""
    down, across = np.mgrid[:height, :width] + 0.5
    inside = (across - width / 2) ** 2 * aspect**2 + (down - height / 2) ** 2 < (height / 3) ** 2
    return np.repeat(np.where(inside, 230, 20)[..., None], 3, axis=2).astype(np.uint8)


def extent(frame):
    """Height and width of what is bright, to a fraction of a pixel."""
    bright = (frame[..., 1].astype(float) - 20) / 210
    return bright.sum(axis=0).max(), bright.sum(axis=1).max()


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
@pytest.mark.parametrize("aspect", ["4/3", "16/11", "8/9"])
def test_a_disc_is_round_and_goes_to_the_bucket_it_is_shown_in(container, aspect):
    height, width = 144, 176
    ratio = Fraction(aspect)
    data = encode([disc(height, width, float(ratio))] * 5, container, fps=8, pixel_aspect=ratio)
    facts = probe_video(data)
    assert (facts.height, facts.width) == (height, round(width * ratio))

    down, across = extent(decode_clip(data, Clip(0.0, 1, 8))[0])
    assert down == pytest.approx(height * 2 / 3, abs=1.5)
    assert across == pytest.approx(down, abs=1.5)

    geometry = Geometry(128, 16, upscale=True, frames=(5,))
    [part] = find_parts(data, "video", geometry, RULE, 9)
    assert part.bucket == geometry.choose(height, round(width * ratio), 5).name
    [found] = decode_parts(data, "video", [part.clip], part.bucket, 9)
    down, across = extent(found.frames[0])
    assert across == pytest.approx(down, abs=1.5)
    assert (found.height, found.width) == (height, round(width * ratio))


def test_the_shape_that_is_coded_and_the_one_that_is_shown_have_other_buckets():
    geometry = Geometry(128, 16, upscale=True, frames=(5,))
    plain, wide = (
        encode([disc(144, 144, 1.0)] * 5, fps=8, pixel_aspect=aspect) for aspect in (None, "4/3")
    )
    names = [find_parts(data, "video", geometry, RULE, 9)[0].bucket for data in (plain, wide)]
    assert names == ["128x128x5", "112x144x5"]


@pytest.mark.parametrize("clockwise", [0, 90, 180, 270])
def test_a_turned_picture_was_stretched_before_it_was_turned(clockwise):
    aspect = Fraction(4, 3)
    upright = [np.rot90(picture, clockwise // 90) for picture in numbered(5, 96, 64)]
    data = turned(encode(upright, fps=8, pixel_aspect=aspect), clockwise)
    size = (64, 128) if clockwise % 180 == 0 else (round(64 * aspect), 96)
    facts = probe_video(data)
    assert (facts.height, facts.width) == size
    frames = decode_clip(data, Clip(0.0, 5, 8))
    assert frames.shape == (5, *size, 3)
    assert numbers(frames) == list(range(5))


def test_a_stretched_picture_is_cropped_as_its_copy_in_square_pixels_would_be():
    """Of a ramp of known levels, at every crop: the one resampling falls where two would."""
    ramp = np.repeat(np.linspace(0, 250, 90)[None, :, None], 60, axis=0).repeat(3, axis=2)
    coded = ramp.astype(np.uint8)
    for bucket in (Bucket(32, 32), Bucket(32, 48), Bucket(16, 64), Bucket(64, 32)):
        for shown in ((60, 120), (60, 67), (60, 90)):
            copy, crop = fit(fit(coded, Bucket(*shown), shown)[0], bucket)
            once, same = fit(coded, bucket, shown)
            assert same == crop
            assert np.abs(once.astype(int) - copy).max() <= 3
    assert np.array_equal(fit(coded, Bucket(32, 32))[0], fit(coded, Bucket(32, 32), (60, 90))[0])


def test_pixels_that_would_be_stretched_beyond_the_bound_are_refused():
    data = encode(numbered(3), fps=8, pixel_aspect="300/7")
    with pytest.raises(BadMedia, match="too large: 2743 x 48 is more than 100000 pixels"):
        probe_video(data, max_pixels=100_000)
    with pytest.raises(BadMedia, match="too large"):
        decode_clip(data, Clip(0.0, 1, 8), max_pixels=100_000)
