import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm_core.conditioning import edges
from ldm_core.conditioning.edges import canny_edges, gaussian_blur, hysteresis, sobel, thin
from ldm_core.media.pixels import to_pixels
from ldm_core.media.shapes import BACKGROUNDS, COLORS, Scene, SceneObject, render_scene

SIDE = 96


def rendered(shape, color="red", background="gray", x=0.5, y=0.5, size="large"):
    """(1, 3, H, W) and the object's centre and half side in pixels."""
    scene = Scene((SceneObject(color, shape, size, x, y),), background, "", None, None)
    picture = to_pixels(np.asarray(render_scene(scene, SIDE)))[None].double()
    return picture, SIDE * x, SIDE * y, SIDE * scene.objects[0].box / 2


def points(found):
    """Centres of the edge pixels: x (N,) and y (N,)."""
    rows, columns = found[0, 0].nonzero().T
    return columns + 0.5, rows + 0.5


def distance_to_square(found, x, y, half):
    """Of every edge pixel's centre to the outline, the larger of both axes."""
    columns, rows = points(found)
    return (torch.maximum((columns - x).abs(), (rows - y).abs()) - half).abs()


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("color", COLORS)
def test_edges_of_a_square_lie_on_its_outline(color, background):
    picture, x, y, half = rendered("square", color, background, x=0.43, y=0.58)
    found = canny_edges(picture)
    assert distance_to_square(found, x, y, half).max() <= 1
    columns, rows = points(found)
    for along, across, low, middle in ((columns, rows, y - half, x), (rows, columns, x - half, y)):
        for side in (low, low + 2 * half):  # all four sides are there, up to their corners
            on_side = along[(across - side).abs() <= 1]
            inner = np.arange(np.ceil(middle - half + 2), np.floor(middle + half - 2)) + 0.5
            assert set(inner) <= set(on_side.tolist())


def test_the_outline_of_a_circle():
    picture, x, y, half = rendered("circle", x=0.45, y=0.52)
    columns, rows = points(canny_edges(picture))
    assert (torch.hypot(columns - x, rows - y) - half).abs().max() <= 1
    angles = torch.atan2(rows - y, columns - x).sort().values
    assert angles.diff().max() * half < 2.5  # no gap


def test_upright_lines_are_one_pixel_wide():
    picture, x, y, half = rendered("square")
    row = canny_edges(picture)[0, 0, int(y)]
    assert row.sum() == 2
    assert (row.nonzero()[:, 0] + 0.5 - torch.tensor([x - half, x + half])).abs().max() <= 1


def test_without_thinning_the_outline_is_missed(monkeypatch):
    monkeypatch.setattr(edges, "thin", lambda slope, dx, dy: slope)
    picture, x, y, half = rendered("square")
    assert distance_to_square(canny_edges(picture), x, y, half).max() > 1


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_nothing_on_a_flat_picture(blur):
    for level in (-1.0, 0.3, 1.0):
        assert canny_edges(torch.full((2, 3, 16, 20), level), blur=blur).sum() == 0


def test_a_slope_below_the_threshold_is_no_edge():
    ramp = torch.linspace(-1, 1, 41, dtype=torch.float64).expand(1, 1, 30, 41)  # 0.05 per pixel
    assert canny_edges(ramp, low=0.06, high=0.06).sum() == 0


def test_a_turned_picture_has_turned_edges():
    picture, *_ = rendered("triangle", x=0.4, y=0.55)
    turned = canny_edges(picture.rot90(dims=(2, 3)))
    straight = canny_edges(picture).rot90(dims=(2, 3))
    near = torch.nn.functional.max_pool2d(turned, 3, 1, 1)
    assert (straight <= near).all()
    assert abs(turned.sum() - straight.sum()) <= 4


def test_slopes_of_a_plane_are_exact():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="ij")
    dx, dy = sobel((0.3 * x - 0.7 * y).double()[None, None])
    inner = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(dx[inner], torch.full((1, 1, 7, 9), 0.3).double())
    torch.testing.assert_close(dy[inner], torch.full((1, 1, 7, 9), -0.7).double())


def test_blur_against_scipy():
    picture = torch.randn(2, 3, 14, 17, dtype=torch.float64)
    expected = ndimage.gaussian_filter(picture.numpy(), 1.5, mode="nearest", radius=5, axes=(2, 3))
    torch.testing.assert_close(gaussian_blur(picture, 1.5), torch.from_numpy(expected))


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (1, 1), (1, -1), (-1, -1), (0, -1)])
def test_across_a_ridge_one_pixel_stays(dx, dy):
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")
    place = (columns - 4) * dx + (rows - 4) * dy
    slope = 1.0 / (1 + place.abs().double())[None, None]
    kept = thin(slope, torch.full_like(slope, dx), torch.full_like(slope, dy))[0, 0] > 0
    assert kept[place == 0].all()
    if dx == 0 or dy == 0:
        assert torch.equal(kept, place == 0)
    else:  # a diagonal meets every second pixel of those beside the ridge, too
        diagonals = kept if dx == dy else kept.flip(1)
        assert all(diagonals.diagonal(offset).sum() == 1 for offset in range(-8, 9))


def test_of_two_equal_slopes_one_stays():
    slope = torch.tensor([0.0, 1.0, 1.0, 0.0]).double().expand(1, 1, 3, 4)
    kept = thin(slope, torch.ones_like(slope), torch.zeros_like(slope))
    assert kept[0, 0, 1].tolist() == [0, 1, 0, 0]


def test_a_weak_edge_needs_a_strong_one_beside_it():
    slope = torch.tensor([[5, 2, 2, 0, 2, 2], [0, 0, 0, 2, 0, 0], [2, 0, 0, 0, 0, 1]]).double()
    kept = hysteresis(slope[None, None], 2, 5)[0, 0].int()
    assert kept.tolist() == [[1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_hysteresis_against_connected_components(seed):
    slope = np.random.default_rng(seed).random((2, 1, 40, 50))
    low, high = 0.62, 0.97
    expected = np.zeros(slope.shape, bool)
    for i in range(2):
        labels, _ = ndimage.label(slope[i, 0] >= low, structure=np.ones((3, 3)))
        strong = set(labels[slope[i, 0] >= high]) - {0}
        expected[i, 0] = np.isin(labels, list(strong))
    assert 0 < expected.sum() < (slope >= low).sum()
    assert np.array_equal(hysteresis(torch.from_numpy(slope), low, high).numpy(), expected)


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.2), (0.0, 0.1), (-1.0, 0.1)])
def test_thresholds_in_the_wrong_order_are_refused_with_both(low, high):
    with pytest.raises(ValueError, match=f"low {low:g} and high {high:g}"):
        canny_edges(torch.zeros(1, 1, 4, 4), low, high)
