import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ldm_core.evaluation.statistics import chance_levels
from ldm_core.evaluation.verifier import find_objects, position_word, verify
from ldm_core.media.shapes import (
    COLORS,
    Scene,
    SceneObject,
    draw_scene,
    pair_scene,
    random_stream,
    render_scene,
    single_scene,
)

SCENES = [draw_scene(11, index) for index in range(400)]
PICTURES = [np.asarray(render_scene(scene, 64)) for scene in SCENES]


def accuracy(pictures, scenes):
    return np.mean([verify(p, s).all for p, s in zip(pictures, scenes, strict=True)])


def test_rendered_scenes_are_recognised():
    assert accuracy(PICTURES, SCENES) >= 0.995


@pytest.mark.parametrize("side", [32, 100, 256])
def test_other_sizes_are_recognised(side):
    pictures = [np.asarray(render_scene(scene, side)) for scene in SCENES[:40]]
    assert accuracy(pictures, SCENES[:40]) >= 0.98


def test_noise_is_tolerated():
    rng = np.random.default_rng(0)
    noisy = [
        np.clip(p + rng.normal(0, 6, p.shape), 0, 255).astype(np.uint8) for p in PICTURES[:120]
    ]
    assert accuracy(noisy, SCENES[:120]) >= 0.97


@pytest.mark.parametrize("radius", [0.7, 1.2])
def test_blur_is_tolerated(radius):
    blur = ImageFilter.GaussianBlur(radius)
    blurred = [np.asarray(Image.fromarray(p).filter(blur)) for p in PICTURES[:120]]
    assert accuracy(blurred, SCENES[:120]) >= 0.97


@pytest.mark.parametrize("objects", [1, 2])
def test_shuffled_captions_score_at_chance(objects):
    scenes = [draw_scene(12, index, objects) for index in range(200)]
    pictures = [np.asarray(render_scene(scene, 64)) for scene in scenes]
    verdicts = [verify(p, s) for p, s in zip(pictures, scenes[1:] + scenes[:1], strict=True)]
    for name, chance in chance_levels("single" if objects == 1 else "double").items():
        measured = np.mean([getattr(verdict, name) for verdict in verdicts])
        deviation = np.sqrt(chance * (1 - chance) / len(scenes))
        assert abs(measured - chance) <= 4 * deviation + 1e-9, name


def wrong(picture_of, judged_against):
    verdict = verify(np.asarray(render_scene(picture_of, 64)), judged_against)
    return {name for name, value in dataclasses.asdict(verdict).items() if value is False}


def single(color="red", shape="cross", size="small", position="left", background="gray"):
    return single_scene(random_stream(0, 9), (color, shape), size, position, background)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("color", "orange"),
        ("shape", "square"),
        ("size", "large"),
        ("position", "bottom"),
        ("background", "black"),
    ],
)
def test_exactly_the_wrong_attribute_is_named(attribute, value):
    assert wrong(single(), single()) == set()
    assert wrong(single(), single(**{attribute: value})) == {attribute}
    assert wrong(single(**{attribute: value}), single()) == {attribute}


def pair(
    kinds=(("red", "cross"), ("blue", "circle")),
    sizes=("small", "small"),
    relation="above",
    background="white",
):
    return pair_scene(random_stream(0, 9), kinds, sizes, relation, background)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"kinds": (("blue", "circle"), ("red", "cross"))}, {"position"}),
        ({"kinds": (("blue", "cross"), ("red", "circle"))}, {"both"}),
        ({"kinds": (("red", "cross"), ("green", "circle"))}, {"color", "both"}),
        ({"kinds": (("red", "square"), ("blue", "circle"))}, {"shape", "both"}),
        ({"sizes": ("large", "small")}, {"size"}),
        ({"relation": "right of"}, {"position"}),
        ({"background": "black"}, {"background"}),
    ],
)
def test_wrong_pairs_are_named(change, expected):
    named = wrong(pair(**change), pair())
    if expected == {"both"}:  # neither matching is better, so the relation has no meaning
        named.discard("position")
    assert named == expected


def test_count():
    two, one = pair(sizes=("large", "small")), single("red", "cross", "large", "top", "white")
    assert wrong(two, one) == {"count"}
    empty = np.full((64, 64, 3), 128, np.uint8)
    verdict = verify(empty, single())
    assert not any((verdict.color, verdict.shape, verdict.size, verdict.position, verdict.count))
    assert verdict.background
    assert verify(empty, pair()).both is False


def scene_of(*things, background="white"):
    return Scene(tuple(things), background, "", None, None)


def test_touching_objects_of_two_colours_are_two():
    scene = scene_of(
        SceneObject("red", "square", "large", 0.3, 0.5),
        SceneObject("blue", "circle", "small", 0.68, 0.5),
    )
    found = find_objects(np.asarray(render_scene(scene, 64)))
    assert [(thing.color, thing.shape) for thing in found] == [
        ("red", "square"),
        ("blue", "circle"),
    ]


def test_a_rim_is_no_object_even_when_its_colour_is_in_the_palette():
    """Red fading into white passes through pink."""
    blur = ImageFilter.GaussianBlur(1.5)
    for shape in ("circle", "cross", "square", "triangle"):
        scene = scene_of(SceneObject("red", shape, "large", 0.5, 0.5))
        found = find_objects(np.asarray(render_scene(scene, 64).filter(blur)))
        assert [(thing.color, thing.shape) for thing in found] == [("red", shape)]


def test_boxes_are_measured():
    for color in COLORS:
        scene = scene_of(SceneObject(color, "triangle", "large", 0.4, 0.6), background="gray")
        (found,) = find_objects(np.asarray(render_scene(scene, 64)))
        assert (found.x, found.y) == pytest.approx((0.4, 0.6), abs=0.02)
        assert (found.width, found.height) == pytest.approx((0.5, 0.5), abs=0.035)


def test_shapeless_and_tiny_things():
    picture = np.full((64, 64, 3), 245, np.uint8)
    picture[10:13, 4:60] = COLORS["green"]  # a bar
    picture[40:44, 40:44] = COLORS["red"]  # a speck
    assert [(thing.color, thing.shape) for thing in find_objects(picture)] == [("green", "unknown")]


def test_position_words():
    places = {"left": (0.3, 0.55), "right": (0.8, 0.5), "top": (0.45, 0.2), "bottom": (0.5, 0.7)}
    assert {position_word(*place) for place in places.values()} == set(places)
    assert all(position_word(*place) == word for word, place in places.items())
    assert position_word(0.45, 0.55) == "center"


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8, got \(3, 64, 64\) float32"):
        find_objects(np.zeros((3, 64, 64), np.float32))
