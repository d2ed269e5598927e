"""The command line as a user meets it: help, mistakes in one line, exit codes, what it prints."""

import json
import subprocess
import sys

import pytest
from command_line import assert_mistake, files_under
from PIL import Image
from small_store import small_store
from tiny_project import tiny_project

from ldm_core import patient_s3
from ldm_core.errors import UserError
from pipelines.exit_codes import JobFailed, exit_code
from pipelines.recipes import RECIPES

STAGES = ("autoencoder", "encode", "train", "distill", "evaluate")
MODELS = ("sample", "serve", "export")
COMMANDS = ("shapes", *STAGES, "demo", *MODELS, "show", "submit", "store", "schedule")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(ldm, command):
    result = ldm(command, "--help")
    assert result.exit_code == 0
    assert f"ldm {command}" in result.stdout.split("Example:")[1]


def test_no_words_print_the_commands_in_their_order(ldm):
    listed = [line.split()[1] for line in ldm("--help").stdout.splitlines() if "│ " in line[:2]]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    assert "train" in ldm().output


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("train nope", ("nope", "image-s", "image-tiny")),
        ("train nope.json", ("nope.json", "ldm show")),
        ("train --set train.stesp=3", ("train.stesp", "train.steps?")),
        ("train --set steps=3", ("no field steps", "train.steps", "distill.steps")),
        ("train --set train.xyz=3", ("train.xyz", "learning_rate")),
        ("train --set train.steps.a=3", ("train.steps has no fields",)),
        ("train --set train.steps", ("--set train.steps=VALUE",)),
        ("train --set train.steps=0", ("train.steps is 0", "greater than or equal to 1")),
        ("train --set train.steps=many", ("train.steps is 'many'", "integer")),
        ("train --set train.steps=", ("train.steps is ''", "integer")),
        ("train --set evaluate.student_steps=null", ("student_steps is 'null'", "tuple")),
        ("train --set train.steps=[1", ("train.steps=[1", "YAML")),
        ("train --set autoencoder.block_channels=[8]", ("autoencoder: downsampling 4", "(8,)")),
        ("autoencoder --dry-run --set size=65", ("size 65", "downsampling 4", "--set size=64")),
        (
            "autoencoder --dry-run --set size=36 --set autoencoder.halved_share=.5",
            ("halved_share is 0.5", "multiple of 8 from 16 on, not 36", "--set size=32"),
        ),
        ("autoencoder --dry-run --set size=8", ("from 16 on, not 8", "--set size=16")),
        ("show image-s --set autoencoder.block_channels=[0,8,8]", ("block_channels.0 is 0",)),
        (
            "train --set train.workers.count=5",
            ("train: micro_batches 2", "5 workers", "micro_batches 5"),
        ),
        ("distill --set distill.batch_size=9", ("distill: batch_size 9", "count 2")),
        ("autoencoder --set autoencoder.workers.count=3", ("autoencoder: batch_size 8",)),
        (
            "evaluate --set evaluate.student_steps=[4,0] --set evaluate.seed=-1",
            ("evaluate.student_steps.1 is 0", "evaluate.seed is -1"),
        ),
        ("train --set precision=fp8 --set size=1", ("precision is 'fp8'", "size is 1")),
        ("train --stesp 3", ("--stesp", "ldm train --help")),
        ("trian", ("trian", "train")),
        ("show nope", ("nope", "image-s")),
        ("show ./nope", ("./nope",)),
        ("shapes out --size 3", ("size is 3",)),
        ("encode --data nowhere --set autoencoder.source=identity", ("nowhere",)),
        ("train --root nowhere", ("nowhere/latents", "ldm encode")),
        ("distill --root nowhere", ("nowhere/teacher", "ldm train")),
        ("sample --prompt x --model nowhere", ("no model at nowhere",)),
        ("sample --prompt x --model nowhere --out grid.gif", ("grid.gif", ".png")),
        ("sample --prompt x --model nowhere --count 0", ("0 pictures",)),
        ("sample --prompt= --model nowhere", ("--prompt is empty",)),
        ("sample --prompt x --model nowhere --device foo", ("--device foo", "cpu")),
        ("sample --prompt x --model nowhere --device meta", ("--device meta", "cpu")),
        ("sample --prompt x", ("--model",)),
        ("serve --root nowhere", ("nowhere/student",)),
        ("serve --root nowhere --dry-run", ("nowhere/student",)),
        ("submit demo", ("demo", "encode")),
        ("submit train --set train.steps=0", ("train.steps is 0",)),
        ("submit train --working-dir nowhere", ("nowhere",)),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(ldm, tmp_path, words, named):
    assert_mistake(ldm(*words.split()), *named)
    assert files_under(tmp_path) == {}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("width=36", ("train: width 36", "heads (2)", "try width 40")),
        ("heads=3", ("train: width 32", "heads (3)", "try width 36")),
        ("patch_size=3", ("train: a latent of 8 x 8", "3 x 3")),
    ],
)
def test_a_transformer_that_does_not_fit_the_latents(ldm, tmp_path, override, named):
    small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    before = files_under(tmp_path)
    words = ("image-tiny", "--root", "run", "--set", "size=8", "--set", f"train.{override}")
    assert_mistake(ldm("train", *words), *named)
    assert files_under(tmp_path) == before


def test_a_file_that_is_no_recipe(ldm, tmp_path):
    for text, named in (("{", "not JSON"), ("[]", "list"), ('{"name": "x"}', "data is missing")):
        (tmp_path / "my.json").write_text(text)
        assert_mistake(ldm("show", "my.json"), named)
    (tmp_path / "my.json").write_text('{"name": "x", "data": "d", "root": "r", "trian": {}}')
    assert_mistake(ldm("show", "my.json"), "trian", "did you mean train?")
    (tmp_path / "my.json").write_text('{"name": "x", "data": "d", "root": "r", "train": 3}')
    assert_mistake(ldm("show", "my.json", "--set", "train.steps=3"), "train is 3")


def test_import_is_light():
    code = "import sys, pipelines.cli; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_driver_does_without_the_libraries_of_its_workers():
    code = (
        "import sys, pipelines.demo, pipelines.stages; "
        "[stage.load() for stage in pipelines.stages.STAGES]; "
        "assert not {'diffusers', 'transformers', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\n  lines"), 2, "ldm: two lines"),
        (KeyboardInterrupt(), 130, "ldm: interrupted; the same command goes on"),
        (JobFailed("job 1 is FAILED"), 1, "ldm: job 1 is FAILED"),
        (RuntimeError("far away\nKeyError: 'x'\n"), 1, "ldm: RuntimeError: KeyError: 'x' (run"),
        (AssertionError(), 1, "ldm: AssertionError (run with --verbose"),
        (
            PermissionError(13, "Permission denied", "/out"),
            2,
            "ldm: PermissionError: [Errno 13] Permission denied: '/out': name a place",
        ),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def run() -> None:
        raise error

    assert exit_code(run, []) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert len(printed.splitlines()) == 1
    exit_code(run, ["--verbose"])
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_pictures_of_another_size_than_the_stores(ldm, tmp_path):
    small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    result = ldm("train", "image-tiny", "--root", "run", "--set", "size=16")
    assert_mistake(result, "size is 16", "holds pictures of 8x8x1", "ldm encode")


def test_an_object_store_that_does_not_answer(ldm, monkeypatch):
    patient_s3.PatientS3.clear_instance_cache()  # one of another test would still know its server
    monkeypatch.setattr(patient_s3, "PATIENCE_S", 0.1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    result = ldm("show", "s3://bucket/model")
    patient_s3.PatientS3.clear_instance_cache()
    assert_mistake(result, "127.0.0.1:9", "check AWS_ENDPOINT_URL")


def test_a_mistake_found_by_a_ray_task_is_the_users(capsys):
    error = RuntimeError("a remote traceback")
    error.cause = UserError("size is 3\nFailed to apply UDF transform after 1/1 attempts")

    def run() -> None:
        raise error

    assert exit_code(run, []) == 2
    assert capsys.readouterr().err == "ldm: size is 3\n"


@pytest.mark.parametrize("words", [[], ["--verbose"]])
def test_a_password_in_an_error_is_not_shown(capsys, words):
    def run() -> None:
        raise RuntimeError("nobody at http://me:hush@127.0.0.1:9/api")

    assert exit_code(run, words) == 1
    printed = capsys.readouterr().err
    assert "http://***@127.0.0.1" in printed
    assert "hush" not in printed


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_saves_its_training_on_the_way(name):
    recipe = RECIPES[name]()
    for section in (recipe.autoencoder, recipe.train, recipe.distill):
        assert section.checkpoint_every <= section.steps / 2


def test_show_prints_what_can_be_passed_again(ldm, tmp_path):
    assert [line.split()[0] for line in ldm("show").stdout.splitlines()] == list(RECIPES)
    words = ["--root", "elsewhere", "--set", "train.steps=5", "--set", "train.workers={count: 4}"]
    words += [
        "--set",
        "evaluate.student_steps=[1, 8]",
        "--set",
        "name=7",
        "--set",
        "train.width=64",
    ]
    words += ["--set", "distill.learning_rate=1e-4", "--set", "tracking_uri=null"]
    first = ldm("show", "image-tiny", *words)
    shown = json.loads(first.stdout)
    assert shown["train"]["workers"] == {"count": 4, "cpus": 1.0, "gpus": 0.0}
    assert shown["evaluate"]["student_steps"] == [1, 8]
    assert (shown["name"], shown["root"], shown["tracking_uri"]) == ("7", "elsewhere", None)
    assert shown["distill"]["learning_rate"] == 1e-4
    (tmp_path / "my.json").write_text(first.stdout)
    assert ldm("show", "my.json").stdout == first.stdout
    assert json.loads(ldm("show", "my.json", "--set", "seed=3").stdout) == {**shown, "seed": 3}


def test_show_a_store_and_a_model(ldm, tmp_path):
    small_store(tmp_path / "latents")
    assert json.loads(ldm("show", tmp_path / "latents").stdout)["counts"]["samples"] == 12
    model = tiny_project(tmp_path / "project", "student")
    assert json.loads(ldm("show", model).stdout)["kind"] == "student"


def test_shapes_are_the_same_bytes(ldm, tmp_path):
    for out in ("a", "b/c"):
        result = ldm("shapes", out, "--count", 12, "--size", 16, "--seed", 3)
        assert result.exit_code == 0, result.output
        assert f"next: ldm autoencoder image-s --data {out}\n" in result.stdout
    assert files_under(tmp_path / "a") == files_under(tmp_path / "b" / "c")
    assert len(files_under(tmp_path / "a")) == 13


def test_shapes_that_are_there_are_left_alone_and_others_replaced(ldm, tmp_path):
    def shapes(*words) -> str:
        return ldm("shapes", "a", "--count", 5, "--seed", 3, *words).stdout

    shapes("--size", 16)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    assert "up to date: a has these 5 pictures" in shapes("--size", 16)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == written
    assert "up to date" not in shapes("--size", 32)
    lost = tmp_path / "a" / "images" / "000000.png"
    lost.unlink()
    shapes("--size", 32)
    assert Image.open(lost).size == (32, 32)


def test_shapes_do_not_go_among_pictures_of_the_users(ldm, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "cat.txt").write_text("a cat")
    result = ldm("shapes", "own", "--count", 5)
    assert result.exit_code == 2
    assert "own already holds other files" in result.stderr
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["cat.txt"]


def test_shapes_to_a_bucket(ldm, tmp_path, s3):
    import fsspec

    assert ldm("shapes", f"{s3}/cli/shapes", "--count", 3, "--size", 16).exit_code == 0
    again = ldm("shapes", f"{s3}/cli/shapes", "--count", 3, "--size", 16)
    assert "up to date" in again.stdout
    ldm("shapes", "local", "--count", 3, "--size", 16)
    fs, root = fsspec.core.url_to_fs(f"{s3}/cli/shapes")
    there = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
    assert there == files_under(tmp_path / "local")
