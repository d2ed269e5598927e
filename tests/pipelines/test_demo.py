"""The demo: what it leaves alone, and once in full on the toy recipe."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from small_store import small_store

from ldm_core.files import read_json
from pipelines import demo, ray_runtime
from pipelines.demo import run_demo
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import ServeSection
from pipelines.stage import Options, read_record

COUNT = 64


def a_recipe(root: Path) -> Recipe:
    changes = {"data": str(root / "data"), "root": str(root / "products")}
    return RECIPES["image-tiny"]().model_copy(update=changes)


def pictures(recipe: Recipe) -> int:
    return len(Path(recipe.data, "captions.jsonl").read_text().splitlines())


def test_pictures_are_made_once_and_again_for_another_number(tmp_path, capsys):
    recipe = a_recipe(tmp_path)
    demo._make_pictures(recipe, 3)
    first = Path(recipe.data, "captions.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    demo._make_pictures(recipe, 3)
    assert "up to date" in capsys.readouterr().out
    assert Path(recipe.data, "captions.jsonl").stat().st_mtime_ns == first
    demo._make_pictures(recipe, 5)
    assert pictures(recipe) == 5


@pytest.mark.parametrize("table", ["captions.jsonl", "metadata.jsonl"])
def test_pictures_of_the_users_own_stay_as_they_are(tmp_path, table, capsys):
    recipe = a_recipe(tmp_path)
    file = Path(recipe.data, table)
    file.parent.mkdir()
    file.write_text(json.dumps({"file": "images/dog.png", "caption": "a dog"}) + "\n")
    demo._make_pictures(recipe, 5)
    assert [path.name for path in file.parent.iterdir()] == [table]
    assert "of your own" in capsys.readouterr().out


def test_models_of_the_users_own_pictures_are_not_evaluated(tmp_path, monkeypatch, capsys):
    recipe = a_recipe(tmp_path)
    small_store(recipe.product("latents"), captions=(("a dog",),))
    Path(recipe.data).mkdir()
    Path(recipe.data, "metadata.jsonl").touch()
    stages = [replace(stage, load=lambda: lambda *_: None) for stage in demo.STAGES[:-1]]
    judge = replace(demo.STAGES[-1], load=lambda: pytest.fail("it was evaluated"))
    monkeypatch.setattr(demo, "STAGES", (*stages, judge))
    monkeypatch.setattr(demo, "_ask_student", lambda *_: None)
    run_demo(recipe, Options(), COUNT)
    assert "[evaluate] left out" in capsys.readouterr().out
    page = Path(recipe.product("report.html")).read_text()
    assert "No judge knows these pictures" in page
    assert "ldm evaluate" not in page


def test_pictures_may_be_made_in_a_bucket(s3, tmp_path, capsys):
    recipe = a_recipe(tmp_path).model_copy(update={"data": f"{s3}/demo-test"})
    demo._make_pictures(recipe, 2)
    demo._make_pictures(recipe, 2)
    assert "up to date" in capsys.readouterr().out


def test_a_taken_port_gives_way_to_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo._with_free_port(ServeSection(port=port)).port not in (port, 0)
    assert demo._with_free_port(ServeSection(port=port)).port == port


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_ends_with_a_report_and_the_second_time_starts_nothing(
    tmp_path, monkeypatch, capsys
):
    recipe = a_recipe(tmp_path)
    run_demo(recipe, Options(), COUNT)
    page = Path(recipe.product("report.html"))
    assert "not there yet" not in page.read_text()
    assert pictures(recipe) == COUNT
    student = read_record(recipe.product("student"))
    assert student is not None
    assert read_json(recipe.product("answer.json"))["model_digest"] == student.summary["digest"]
    assert Path(recipe.product("answer.png")).read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    forbidden = lambda *_, **__: pytest.fail("Ray was started")  # noqa: E731
    monkeypatch.setattr(ray_runtime, "start", forbidden)
    monkeypatch.setattr(ray, "init", forbidden)
    run_demo(recipe, Options(), COUNT)
    assert capsys.readouterr().out.count("up to date") == 7
