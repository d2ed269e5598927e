import numpy as np
import pytest
import torch

from ldm_core.conditioning.depth import depth_proxy, solve_poisson
from ldm_core.conditioning.segmentation import (
    color_segments,
    dominant_colors,
    segmentation_hint,
)
from ldm_core.media.pixels import to_pixels
from ldm_core.media.shapes import BACKGROUNDS, COLORS, Scene, SceneObject, coverage, render_scene

SIDE = 32


def square(background="black", size=SIDE):
    """Half as wide as the picture, on whole pixels; (1, 3, H, W) float64 and its mask (H, W)."""
    scene = Scene((SceneObject("cyan", "square", "large", 0.5, 0.5),), background, "", None, None)
    picture = to_pixels(np.asarray(render_scene(scene, size)))[None].double()
    inside = coverage("square", size / 2, size / 2, size / 2, size, size) == 1
    return picture, torch.from_numpy(inside)


def laplacian(h):
    padded = torch.nn.functional.pad(h, (1, 1, 1, 1), mode="replicate")
    return (
        padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1] + padded[..., 1:-1, 2:]
        + padded[..., 1:-1, :-2] - 4 * h
    )  # fmt: skip


@pytest.mark.parametrize("size", [(8, 8), (7, 12), (1, 9)])
def test_poisson_is_solved_with_flat_borders(size):
    relief = torch.randn(2, 1, *size, dtype=torch.float64)
    relief -= relief.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(solve_poisson(laplacian(relief)), relief, rtol=0, atol=1e-12)


def test_without_a_threshold_it_is_the_brightness():
    picture = torch.rand(2, 3, 9, 14, dtype=torch.float64)
    brightness = picture.mean(dim=1, keepdim=True)
    expected = brightness - brightness.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(depth_proxy(picture, 0.0), expected, rtol=0, atol=1e-12)


def test_an_object_is_a_layer():
    picture, inside = square()
    relief = depth_proxy(picture)[0, 0]
    step = picture[0, :, SIDE // 2, SIDE // 2].mean() - picture[0, :, 0, 0].mean()
    assert relief[inside].mean() - relief[~inside].mean() == pytest.approx(float(step), abs=1e-12)
    assert max(relief[inside].std(), relief[~inside].std()) < 1e-12


def test_shading_is_no_depth():
    ramp = torch.linspace(-0.3, 0.3, SIDE, dtype=torch.float64).view(1, 1, 1, -1)  # 0.02 per pixel
    assert depth_proxy(ramp.expand(1, 1, SIDE, SIDE)).abs().max() < 1e-13
    picture, inside = square()
    shaded, plain = depth_proxy(picture + ramp)[0, 0], depth_proxy(picture)[0, 0]
    contrast = plain[inside].mean() - plain[~inside].mean()
    assert (shaded - plain).abs().max() < 0.05 * contrast
    assert (depth_proxy(picture + ramp, 0.0)[0, 0] - plain).abs().max() > 0.2 * contrast


def test_the_colours_of_a_scene_segment_it():
    palette = torch.tensor(list(BACKGROUNDS.values()) + list(COLORS.values())) / 127.5 - 1
    names = [*BACKGROUNDS, *COLORS]
    for background in BACKGROUNDS:
        picture, inside = square(background)
        segments = color_segments(picture, palette.double())[0]
        assert (segments[inside] == names.index("cyan")).all()
        assert (segments[~inside] == names.index(background)).all()
        hint = segmentation_hint(picture, palette.double())
        torch.testing.assert_close(hint, picture, rtol=0, atol=1e-6)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_pictures_own_colours_are_found(background):
    picture, inside = square(background)
    palette = dominant_colors(picture, 2)
    segments = color_segments(picture, palette)[0]
    assert torch.equal(segments == segments[SIDE // 2, SIDE // 2], inside)
    torch.testing.assert_close(segmentation_hint(picture, palette), picture, rtol=0, atol=1e-12)


def test_every_picture_of_a_batch_has_its_own_palette():
    black, white = square("black")[0], square("white")[0]
    both = dominant_colors(torch.cat([black, white]), 2)
    assert torch.equal(both[:1], dominant_colors(black, 2))
    assert torch.equal(both[1:], dominant_colors(white, 2))
    hints = segmentation_hint(torch.cat([black, white]), both)
    torch.testing.assert_close(hints, torch.cat([black, white]), rtol=0, atol=1e-12)


def test_a_palette_is_where_its_pixels_are_and_a_segmentation_stays():
    picture = torch.rand(1, 3, 20, 20, dtype=torch.float64)
    palette = dominant_colors(picture, 4, iterations=200)
    segments = color_segments(picture, palette)[0]
    for index in range(4):
        mean = picture[0][:, segments == index].mean(dim=1)
        torch.testing.assert_close(palette[0, index], mean, rtol=0, atol=1e-12)
    hint = segmentation_hint(picture, palette)
    assert torch.equal(segmentation_hint(hint, palette), hint)


def test_more_colours_than_there_are_do_no_harm():
    picture, _ = square()
    palette = dominant_colors(picture, 5)
    assert palette.isfinite().all()
    torch.testing.assert_close(segmentation_hint(picture, palette), picture, rtol=0, atol=1e-12)
