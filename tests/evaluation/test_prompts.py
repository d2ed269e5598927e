from collections import Counter

import pytest

from ldm_core.errors import UserError
from ldm_core.evaluation.prompts import evaluation_scenes, is_scene_caption
from ldm_core.media.shapes import draw_scene


@pytest.mark.parametrize("kind", ["single", "double"])
def test_colours_and_shapes_are_covered_evenly(kind):
    scenes = evaluation_scenes(kind, 96, seed=0)
    kinds = Counter((s.objects[0].color, s.objects[0].shape) for s in scenes)
    assert len(kinds) == 32
    assert set(kinds.values()) == {3}
    where = Counter(scene.position or scene.relation for scene in scenes)
    assert max(where.values()) - min(where.values()) <= 8


def test_pairs_differ_and_sizes_are_mixed():
    scenes = evaluation_scenes("double", 64, seed=0)
    assert all(
        (s.objects[0].color, s.objects[0].shape) != (s.objects[1].color, s.objects[1].shape)
        for s in scenes
    )
    assert len({tuple(o.size for o in s.objects) for s in scenes}) == 3


def test_scenes_are_fixed_and_a_short_list_begins_a_long_one():
    long = evaluation_scenes("single", 50, seed=4)
    assert evaluation_scenes("single", 50, seed=4) == long
    assert evaluation_scenes("single", 20, seed=4) == long[:20]
    assert evaluation_scenes("single", 50, seed=5) != long


def test_no_scene_is_one_of_training():
    training = {draw_scene(0, index).objects for index in range(500)}
    evaluation = {s.objects for k in ("single", "double") for s in evaluation_scenes(k, 64, 0)}
    assert not training & evaluation


def test_senseless_requests_are_refused():
    with pytest.raises(UserError, match="use 'single' or 'double'"):
        evaluation_scenes("triple", 5, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="count is 0"):
        evaluation_scenes("single", 0, 0)


def test_every_caption_of_a_scene_is_known_as_one():
    training = [draw_scene(7, index) for index in range(1500)]
    evaluation = [s for kind in ("single", "double") for s in evaluation_scenes(kind, 300, 7)]
    assert all(is_scene_caption(scene.caption) for scene in training + evaluation)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog on grass",
        "a red circle",
        "a large red circle in the center, white background, photograph",
        "a large brown circle in the center, white background",
        "A large red circle in the center, white background",
    ],
)
def test_other_captions_are_not(caption):
    assert not is_scene_caption(caption)
