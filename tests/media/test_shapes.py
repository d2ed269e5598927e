import hashlib
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from ldm_core.errors import UserError
from ldm_core.media.captions import PLACES, RELATION_PHRASES
from ldm_core.media.shapes import (
    BACKGROUNDS,
    COLORS,
    MARGIN,
    SHAPES,
    SIZES,
    coverage,
    draw_scene,
    render_scene,
    write_shapes,
)

SCENES = [draw_scene(3, index) for index in range(1500)]


def _digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in files}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shapes(tmp_path / name, 20, 32, seed)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert _digests(tmp_path / "a") != _digests(tmp_path / "c")


def test_a_scene_does_not_depend_on_the_ones_before():
    assert draw_scene(3, 17) == SCENES[17]
    assert draw_scene(4, 17) != SCENES[17]


def test_objects_lie_inside_and_apart():
    for scene in SCENES:
        for thing in scene.objects:
            reach = thing.box / 2 + MARGIN - 1e-3
            assert reach <= thing.x <= 1 - reach
            assert reach <= thing.y <= 1 - reach
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.box + b.box) / 2
            assert (a.color, a.shape) != (b.color, b.shape)


def test_relation_is_first_to_second():
    for scene in SCENES:
        if scene.relation:
            a, b = scene.objects
            dx, dy = a.x - b.x, a.y - b.y
            signed = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
            assert signed[scene.relation] == max(signed.values())


def test_number_of_objects():
    singles = sum(len(scene.objects) == 1 for scene in SCENES) / len(SCENES)
    assert 0.6 < singles < 0.7
    assert all(len(draw_scene(0, i, objects=1).objects) == 1 for i in range(20))
    assert all(len(draw_scene(0, i, objects=2).objects) == 2 for i in range(20))


def test_captions_state_every_attribute():
    for scene in SCENES:
        assert scene.caption == scene.caption.lower()
        for thing in scene.objects:
            assert {thing.color, thing.shape, thing.size} <= set(
                scene.caption.replace(",", "").split()
            )
        assert scene.background in scene.caption
        where = PLACES[scene.position] if scene.position else scene.relation
        assert where in scene.caption or RELATION_PHRASES[where] in scene.caption
        assert "a orange" not in scene.caption


def test_captions_vary():
    wordings = set()
    for scene in SCENES:
        words = scene.caption.replace(",", " ,").split()
        vocabulary = {*COLORS, *SHAPES, *SIZES, *BACKGROUNDS}
        wordings.add(" ".join("_" if word in vocabulary else word for word in words))
    assert len(wordings) >= 40


def test_pictures_of_two_sizes_agree():
    for scene in SCENES[:20]:
        large = np.asarray(render_scene(scene, 256)).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        small = np.asarray(render_scene(scene, 64)).astype(float)
        assert abs(large - small).max() < 24  # an edge is placed to an eighth of a pixel
        assert abs(large - small).mean() < 0.5


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi / 4), ("square", 1), ("triangle", 1 / 2), ("cross", 5 / 9)]
)
def test_areas_are_those_of_geometry(shape, area):
    assert coverage(shape, 32.3, 31.8, 40, 64, 64).sum() == pytest.approx(area * 1600, rel=0.01)


def test_written_records_describe_the_pictures(tmp_path):
    progress = []
    write_shapes(tmp_path, 40, 48, seed=5, on_progress=progress.append)
    records = [json.loads(line) for line in (tmp_path / "captions.jsonl").open()]
    assert progress == list(range(1, 41))
    assert {path.name for path in tmp_path.iterdir()} == {"images", "captions.jsonl"}
    suffixes = [record["file"].rsplit(".")[-1] for record in records]
    assert [suffixes.count(s) for s in ("png", "jpg", "webp")] == [32, 4, 4]
    for index, record in enumerate(records):
        scene = draw_scene(5, index)
        assert record["caption"] == scene.caption
        assert [thing["color"] for thing in record["objects"]] == [o.color for o in scene.objects]
        assert ("position" in record) != ("relation" in record)
        picture = np.asarray(Image.open(tmp_path / record["file"]).convert("RGB")).astype(int)
        difference = picture - np.asarray(render_scene(scene, 48))
        assert abs(difference).mean() < 2  # JPEG; the others are exact


def test_a_killed_run_leaves_no_captions_and_can_be_repeated(tmp_path):
    def die(done):
        if done == 7:
            raise KeyboardInterrupt

    write_shapes(tmp_path, 12, 32, seed=1)
    whole = _digests(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, 12, 32, seed=1, on_progress=die)
    assert not (tmp_path / "captions.jsonl").exists()
    write_shapes(tmp_path, 12, 32, seed=1)
    assert _digests(tmp_path) == whole


def test_pictures_of_another_run_are_not_mixed_in(tmp_path):
    write_shapes(tmp_path, 12, 32, seed=1)
    with pytest.raises(UserError, match=r"2 other files, such as 000010\.png"):
        write_shapes(tmp_path, 10, 32, seed=1)
    assert (tmp_path / "captions.jsonl").exists()


@pytest.mark.parametrize(("count", "size", "seed"), [(0, 64, 0), (5, 8, 0), (5, 64, -1)])
def test_senseless_numbers_are_refused(tmp_path, count, size, seed):
    with pytest.raises(UserError, match="use"):
        write_shapes(tmp_path, count, size, seed)
