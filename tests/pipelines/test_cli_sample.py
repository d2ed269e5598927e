"""`ldm sample`: pictures, their words, and what it refuses to draw."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import assert_mistake
from PIL import Image
from tiny_project import tiny_project

from ldm_core.generation import PictureGenerator


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return tiny_project(tmp_path_factory.mktemp("project"), "student")


def text_of(file: Path) -> object:
    return json.loads(Image.open(file).info["ldm"])


def test_a_mistake_is_all_that_is_printed_even_when_libraries_would_talk(student):
    words = ("sample", "--model", student, "--prompt", "a red cat", "--guidance", "3")
    command = [sys.executable, "-m", "pipelines.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ldm: guidance is 3.0")
    assert len(done.stderr.splitlines()) == 1


def test_sample_the_same_seed_draws_the_same_pictures(ldm, tmp_path, student):
    words = ("--model", student, "--prompt", "a red cat", "--device", "cpu", "--seed", 7)
    result = ldm("sample", *words, "--count", 3, "--out", "new/grid.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "new/grid.png"
    ldm("sample", *words, "--count", 3, "--out", "again.png")
    first, again = tmp_path / "new" / "grid.png", tmp_path / "again.png"
    assert first.read_bytes() == again.read_bytes()
    texts = text_of(first)
    assert [text["seed"] for text in texts] == [7, 8, 9]
    assert {(t["prompt"], t["steps"], t["guidance"]) for t in texts} == {("a red cat", 2, 1.0)}
    assert len({text["model"] for text in texts}) == 1

    ldm("sample", *words, "--count", 3, "--out", "each/")
    each = sorted((tmp_path / "each").iterdir())
    assert [text_of(file) for file in each] == texts
    assert len({file.read_bytes() for file in each}) == 3
    ldm("sample", *words, "--out", "one.png")
    one, alone = Image.open(tmp_path / "one.png"), Image.open(each[0])
    assert one.size == alone.size == (8, 8)
    assert text_of(tmp_path / "one.png") == texts[0]


def test_sample_several_prompts_are_rows(ldm, tmp_path, student):
    prompts = ("--prompt", "a red cat", "--prompt", "a blue dog")
    words = ("--model", student, *prompts, "--count", 3, "--steps", 1, "--out", "rows.png")
    assert ldm("sample", *words).exit_code == 0
    sheet = Image.open(tmp_path / "rows.png")
    assert sheet.size == (3 * 10 + 2, 2 * 10 + 2)
    texts = text_of(tmp_path / "rows.png")
    assert [(text["prompt"][2:5], text["seed"]) for text in texts] == [
        ("red", 0), ("red", 1), ("red", 2), ("blu", 0), ("blu", 1), ("blu", 2),
    ]  # fmt: skip
    assert {text["steps"] for text in texts} == {1}


def test_sample_refuses_what_the_model_cannot_draw(ldm, student):
    words = ("sample", "--model", student, "--prompt", "a red cat")
    for option, value, named in (("--steps", 0, "steps is 0"), ("--seed", -1, "seed is -1")):
        result = ldm(*words, option, value)
        assert result.exit_code == 2
        assert named in result.stderr.splitlines()[-1]


def test_sample_does_not_draw_what_it_cannot_write(ldm, tmp_path, student, monkeypatch):
    monkeypatch.setattr(PictureGenerator, "generate", lambda *_: pytest.fail("it was drawn"))
    (tmp_path / "file").touch()
    for out in ("file/grid.png", "file/each/"):  # an unwritable place even for root
        result = ldm("sample", "--model", student, "--prompt", "a red cat", "--out", out)
        assert result.exit_code == 2, result.output
        assert f"--out {out}: cannot write in file" in result.stderr.splitlines()[-1]


def test_sample_with_a_sampler_of_ones_own(ldm, tmp_path, student, tmp_path_factory):
    teacher = tiny_project(tmp_path_factory.mktemp("project"))
    words = ("sample", "--model", teacher, "--prompt", "a red cat", "--seed", 3)
    pictures = {}
    for name, more in {"plain": (), "2m": ("--sampler", "dpmpp-2m"),
                       "eta": ("--sampler", "ddim", "--eta", 1.0)}.items():  # fmt: skip
        assert ldm(*words, *more, "--out", f"{name}.png").exit_code == 0
        pictures[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert len(set(pictures.values())) == 3
    assert text_of(tmp_path / "plain.png")["sampler"] is None
    assert text_of(tmp_path / "eta.png")["sampler"] == {"name": "ddim", "eta": 1.0}
    assert_mistake(ldm(*words, "--sampler", "heun", "--eta", 0.5), "eta is 0.5, but heun is")
    assert_mistake(ldm(*words, "--eta", 0.5), "eta is 0.5, but euler is an ODE solver")
    assert_mistake(ldm(*words, "--sampler", "plms"), "sampler 'plms'")
    on_student = ("sample", "--model", student, "--prompt", "x", "--sampler", "heun")
    result = ldm(*on_student)
    assert (result.exit_code, "sampler is heun" in result.stderr.splitlines()[-1]) == (2, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here cuda can be used")
def test_sample_refuses_a_gpu_that_is_not_there(ldm):
    result = ldm("sample", "--model", "nowhere", "--prompt", "x", "--device", "cuda")
    assert_mistake(result, "--device cuda", "auto")
