import itertools
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from ldm_core.errors import BadMedia, UserError
from ldm_core.media.buckets import Bucket, Geometry, causal_lengths, fit
from ldm_core.media.decode import fit_to_square

GEOMETRIES = [
    Geometry(size, multiple, aspect, upscale)
    for size, multiple in ((64, 16), (256, 16), (512, 64), (96, 8), (16, 16), (60, 4))
    for aspect in (1.0, 1.5, 2.0, 4.0)
    for upscale in (False, True)
]


def random_sizes(seed, count, low, high):
    """(height, width) log-uniform in [low, high]."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(math.log(low), math.log(high), size=(count, 2)))
    return [(int(h), int(w)) for h, w in sides.clip(low, high)]


def turned(bucket):
    return Bucket(bucket.width, bucket.height, bucket.frames)


def mismatch(bucket, height, width):
    """Factor between the aspects, 1 or more."""
    return math.exp(abs(math.log(bucket.height / bucket.width) - math.log(height / width)))


def picture(height, width, *frames, seed=0):
    rng = np.random.default_rng([seed, height, width])
    return rng.integers(0, 256, (*frames, height, width, 3), dtype=np.uint8)


def assert_fit(geometry, height, width):
    """Everything a chosen bucket promises for one size."""
    bucket = geometry.choose(height, width)
    assert bucket in geometry.buckets()
    assert geometry.upscale or (bucket.height <= height and bucket.width <= width)
    assert geometry.choose(width, height) == turned(bucket)
    times = 3
    larger = geometry.choose(times * height, times * width)
    assert larger.height * larger.width >= bucket.height * bucket.width


class TestBuckets:
    def test_names_are_the_stores(self):
        assert Bucket(256, 320).name == "256x320x1"
        assert Bucket.parse("64x96x17") == Bucket(64, 96, 17)
        for geometry in GEOMETRIES:
            assert [Bucket.parse(one.name) for one in geometry.buckets()] == geometry.buckets()

    @pytest.mark.parametrize(
        "name", ["", "64x64", "64x64x0", "064x64x1", "6x-6x1", "axbxc", "²x1x1"]
    )
    def test_what_is_no_name_is_refused(self, name):
        with pytest.raises(UserError, match="is no bucket: write height x width x frames"):
            Bucket.parse(name)

    def test_a_known_list(self):
        wide = [(256, 256), (240, 272), (224, 288), (208, 304), (192, 336)]
        tall = [(w, h) for h, w in reversed(wide[1:])]
        found = Geometry(256, 16, upscale=True).buckets()
        assert [(one.height, one.width) for one in found] == tall + wide

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_the_top_scale_has_nearly_as_many_pixels_as_the_square(self, geometry):
        size, multiple = geometry.size, geometry.multiple
        top = replace(geometry, upscale=True).buckets()
        assert geometry.buckets()[: len(top)] == top
        for one in top:
            assert 1 - multiple / size < one.height * one.width / size**2 <= 1

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_all_are_multiples_within_the_aspect_and_turn_into_each_other(self, geometry):
        found = geometry.buckets()
        assert len(set(found)) == len(found)
        assert set(found) == {turned(one) for one in found}
        assert Bucket(geometry.size, geometry.size) in found
        for one in found:
            assert one.height % geometry.multiple == one.width % geometry.multiple == 0
            assert 1 / geometry.max_aspect <= one.height / one.width <= geometry.max_aspect

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_each_scale_has_at_most_half_the_pixels_of_the_one_above(self, geometry):
        sides = [one.height for one in geometry.buckets() if one.height == one.width]
        assert sides[-1] == (geometry.size if geometry.upscale else geometry.multiple)
        for above, below in itertools.pairwise(sides):
            assert 2 * below**2 <= above**2
            assert 2 * (below + geometry.multiple) ** 2 > above**2  # and no fewer than need be

    def test_a_copy_that_travelled_says_the_same(self):
        geometry = Geometry(256, 16)
        geometry.choose(300, 200)
        travelled = pickle.loads(pickle.dumps(geometry))
        assert travelled == geometry == Geometry(256, 16)
        assert travelled.buckets() == geometry.buckets() == Geometry(256, 16).buckets()


class TestChoice:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_every_size_from_the_multiple_up_has_a_bucket(self, geometry):
        for height, width in random_sizes(1, 300, geometry.multiple, 8 * geometry.size):
            assert_fit(geometry, height, width)

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_large_pictures_are_on_the_top_scale_and_the_aspect_error_is_bounded(self, geometry):
        """The bound that `Geometry` proves."""
        share, aspect = geometry.multiple / geometry.size, geometry.max_aspect
        bound = (1 + share * math.sqrt(aspect)) ** 2 / (1 - share) if share < 1 else math.inf
        top = replace(geometry, upscale=True)
        longest = max(one.width for one in top.buckets())
        for height, width in random_sizes(2, 300, longest, 20 * geometry.size):
            bucket = geometry.choose(height, width)
            assert bucket == top.choose(height, width)
            if max(height, width) <= aspect * min(height, width):
                assert mismatch(bucket, height, width) < bound

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_no_bucket_of_the_scale_has_a_nearer_aspect(self, geometry):
        top = replace(geometry, upscale=True)
        for height, width in random_sizes(3, 200, 1, 2000):
            chosen = mismatch(top.choose(height, width), height, width)
            nearest = min(mismatch(one, height, width) for one in top.buckets())
            assert chosen <= nearest * (1 + 1e-12)

    def test_no_picture_gives_up_much_more_than_half_of_its_pixels(self):
        geometry = Geometry(512, 16)
        kept = []
        for height, width in random_sizes(4, 2000, 128, 768):
            if max(height, width) <= 2 * min(height, width):
                bucket = geometry.choose(height, width)
                kept.append(bucket.height * bucket.width / min(height * width, 512**2))
        assert min(kept) > 0.4
        assert np.mean(kept) > 0.7

    def test_of_buckets_equally_near_the_squarer_one(self):
        geometry = Geometry(32, 16, 4.0, upscale=True)
        assert geometry.choose(100, 200) == Bucket(32, 32)
        assert geometry.choose(200, 100) == Bucket(32, 32)
        assert geometry.choose(100, 201) == Bucket(16, 64)

    def test_a_side_shorter_than_the_multiple_is_too_small(self):
        geometry = Geometry(64, 16)
        assert geometry.choose(16, 5000) == Bucket(16, 16)
        with pytest.raises(BadMedia, match="40 x 15 pixels.*upscale=True") as caught:
            geometry.choose(15, 40)
        assert (caught.value.stage, caught.value.reason) == ("decode", "too small")
        assert replace(geometry, upscale=True).choose(15, 40) == Bucket(48, 80)
        assert replace(geometry, upscale=True).choose(1, 1) == Bucket(64, 64)


class TestLengths:
    def test_causal_lengths(self):
        assert causal_lengths(17, 4) == (1, 5, 9, 13, 17)
        assert causal_lengths(20, 8) == (1, 9, 17)
        assert causal_lengths(1, 4) == (1,)
        assert causal_lengths(3, 1) == (1, 2, 3)
        for longest, stride in ((0, 4), (9, 0)):
            with pytest.raises(UserError, match=f"up to {longest} frames in steps of {stride}"):
                causal_lengths(longest, stride)

    def test_a_clip_gets_the_longest_length_it_has(self):
        geometry = Geometry(64, 16, frames=causal_lengths(33, 4))
        lengths = [geometry.choose(90, 70, frames).frames for frames in range(1, 60)]
        assert lengths == sorted(lengths)
        for frames, length in enumerate(lengths, start=1):
            assert length == 1 + 4 * min((frames - 1) // 4, 8)

    def test_every_shape_comes_in_every_length(self):
        still, clips = Geometry(64, 16), Geometry(64, 16, frames=(1, 5, 9))
        assert clips.buckets() == [
            replace(one, frames=length) for one in still.buckets() for length in (1, 5, 9)
        ]

    def test_a_clip_shorter_than_all_is_bad_media(self):
        with pytest.raises(BadMedia, match="too short: 4 frames, the shortest bucket has 5"):
            Geometry(64, 16, frames=(5, 9)).choose(64, 64, 4)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"size": 100, "multiple": 16}, "size 100 is not a multiple of 16 .* try 96"),
            ({"size": 0, "multiple": 16}, "size 0 .* try 16"),
            ({"size": 64, "multiple": 0}, "multiple is 0"),
            ({"size": 64, "multiple": 16, "max_aspect": 0.5}, "max_aspect is 0.5"),
            ({"size": 64, "multiple": 16, "max_aspect": math.nan}, "max_aspect is nan"),
            ({"size": 64, "multiple": 16, "max_aspect": math.inf}, "max_aspect is inf"),
            ({"size": 64, "multiple": 16, "frames": ()}, r"frames \(\)"),
            ({"size": 64, "multiple": 16, "frames": (0, 4)}, r"frames \(0, 4\)"),
            ({"size": 64, "multiple": 16, "frames": (5, 5)}, r"frames \(5, 5\)"),
            ({"size": 64, "multiple": 16, "frames": (5, 1)}, r"frames \(5, 1\)"),
        ],
    )
    def test_out_of_range_is_refused(self, settings, words):
        with pytest.raises(UserError, match=words):
            Geometry(**settings)


class TestFit:
    def test_squares_are_todays_squares(self):
        for upscale in (True, False):
            geometry = Geometry(48, 16, max_aspect=1.0, upscale=upscale)
            for height, width in [(48, 48), (48, 90), (90, 48), *random_sizes(5, 60, 16, 200)]:
                pixels = picture(height, width)
                bucket = geometry.choose(height, width)
                assert bucket.height == bucket.width
                assert bucket.height == 48 or (not upscale and min(height, width) < 48)
                square, crop = fit_to_square(pixels, bucket.height)
                fitted, found = fit(pixels, bucket)
                assert found == crop
                np.testing.assert_array_equal(fitted, square)

    @pytest.mark.parametrize("upscale", [False, True])
    def test_the_crop_is_centred_has_the_buckets_shape_and_is_as_large_as_can_be(self, upscale):
        geometry = Geometry(96, 8, upscale=upscale)
        for height, width in random_sizes(6, 150, 8, 400):
            bucket = geometry.choose(height, width)
            fitted, (left, top, right, bottom) = fit(picture(height, width), bucket)
            assert fitted.shape == (bucket.height, bucket.width, 3)
            assert fitted.dtype == np.uint8
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert (left, top) == ((width - right + left) // 2, (height - bottom + top) // 2)
            high, wide = bottom - top, right - left
            assert high == height or wide == width
            whole_pixels = max(abs(high - wide * bucket.height / bucket.width), 0)
            whole_pixels = min(whole_pixels, abs(wide - high * bucket.width / bucket.height))
            assert whole_pixels <= 0.5 or min(high, wide) == 1
            if not upscale:
                assert high >= bucket.height
                assert wide >= bucket.width

    def test_what_is_cropped_away_is_bounded_within_the_aspect(self):
        geometry = Geometry(256, 16)
        share = 16 / 256
        bound = 1 - (1 - share) / (1 + share * math.sqrt(2)) ** 2
        cropped = []
        for height, width in random_sizes(7, 300, 336, 900):
            if max(height, width) <= 2 * min(height, width):
                bucket = geometry.choose(height, width)
                kept = 1 / mismatch(bucket, height, width)
                cropped.append(1 - kept)
                _, (left, top, right, bottom) = fit(np.zeros((height, width, 3), np.uint8), bucket)
                area = (right - left) * (bottom - top) / (height * width)
                assert abs(area - kept) <= 0.5 / min(height, width)  # a crop has whole pixels
        assert max(cropped) < bound
        assert np.mean(cropped) < 0.05

    def test_the_buckets_own_size_is_untouched(self):
        for bucket in Geometry(64, 8).buckets():
            pixels = picture(bucket.height, bucket.width)
            fitted, crop = fit(pixels, bucket)
            np.testing.assert_array_equal(fitted, pixels)
            assert crop == (0, 0, bucket.width, bucket.height)
            assert not np.shares_memory(fitted, pixels)

    def test_a_picture_with_one_side_of_the_buckets_is_only_cropped(self):
        bucket = Bucket(48, 80)
        pixels = picture(48, 101)
        fitted, crop = fit(pixels, bucket)
        assert crop == (10, 0, 90, 48)
        np.testing.assert_array_equal(fitted, pixels[:, 10:90])

    def test_resampling_keeps_a_ramp(self):
        """Half the size of a linear ramp is the mean of its pairs; the borders see less of it."""
        ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None] * 2, (96, 128, 3))
        fitted, crop = fit(np.ascontiguousarray(ramp), Bucket(48, 64))
        assert crop == (0, 0, 128, 96)
        inside = np.broadcast_to(np.arange(64)[4:-4] * 4 + 1, (48, 56))
        np.testing.assert_array_equal(fitted[:, 4:-4, 0], inside)

    def test_a_clip_is_its_frames(self):
        clip = picture(70, 50, 5)
        bucket = Bucket(48, 32, 5)
        fitted, crop = fit(clip, bucket)
        assert fitted.shape == (5, 48, 32, 3)
        for frame, result in zip(clip, fitted, strict=True):
            still, same = fit(frame, Bucket(48, 32))
            np.testing.assert_array_equal(result, still)
            assert same == crop
        one, _ = fit(clip[:1], Bucket(48, 32))
        assert one.shape == (1, 48, 32, 3)

    def test_a_clip_of_another_length_is_a_mistake_of_the_program(self):
        with pytest.raises(AssertionError, match="4 frames for bucket 48x32x5"):
            fit(picture(70, 50, 4), Bucket(48, 32, 5))

    def test_tiny_pictures_are_enlarged_if_asked(self):
        for height, width in ((1, 1), (1, 40), (3, 2), (40, 1)):
            bucket = Geometry(64, 16, upscale=True).choose(height, width)
            fitted, _ = fit(np.full((height, width, 3), 77, np.uint8), bucket)
            assert fitted.shape == (bucket.height, bucket.width, 3)
            assert (fitted == 77).all()
