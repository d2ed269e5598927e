"""The command line as a user meets it: help, mistakes in one line, exit codes, what it prints."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from small_store import small_store
from tiny_project import tiny_project
from typer.testing import CliRunner, Result

from ldm_core.errors import UserError
from ldm_core.files import join, write_json
from ldm_core.generation import PictureGenerator
from pipelines import cli_options, distill_student, train_denoiser
from pipelines.cli import app
from pipelines.exit_codes import JobFailed, exit_code
from pipelines.quiet import VARIABLES
from pipelines.recipes import RECIPES
from pipelines.stage import Record, stage_digest

STAGES = ("autoencoder", "encode", "train", "distill", "evaluate")
COMMANDS = ("shapes", *STAGES, "demo", "sample", "serve", "show", "submit")
Ldm = Callable[..., Result]


@pytest.fixture
def ldm(monkeypatch, tmp_path) -> Ldm:
    """Runs `ldm WORDS` in an empty directory."""
    monkeypatch.setattr(cli_options, "quiet", lambda: None)  # would last for the other tests
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*words: object) -> Result:
        return CliRunner().invoke(app, list(map(str, words)), prog_name="ldm")

    return run


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return tiny_project(tmp_path_factory.mktemp("project"), "student")


def files_under(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_mistake(result: Result, *named: str) -> None:
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in named:
        assert word in result.stderr


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
        ("show image-s --set autoencoder.block_channels=[0,8,8]", ("block_channels.0 is 0",)),
        ("train --set train.workers.count=5", ("train: batch_size 32", "count 5", "batch_size 35")),
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
        ("patch_size=3", ("train: a latent of 4 x 4", "3 x 3")),
    ],
)
def test_a_transformer_that_does_not_fit_the_latents(ldm, tmp_path, override, named):
    small_store(tmp_path / "run" / "latents", shape=(2, 4, 4))
    before = files_under(tmp_path)
    words = ("image-tiny", "--root", "run", "--set", f"train.{override}")
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


def test_a_mistake_is_all_that_is_printed_even_when_libraries_would_talk(student):
    words = ("sample", "--model", student, "--prompt", "a red cat", "--guidance", "3")
    command = [sys.executable, "-m", "pipelines.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ldm: guidance is 3.0")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two\n  lines"), 2, "ldm: two lines"),
        (KeyboardInterrupt(), 130, "ldm: interrupted; the same command goes on"),
        (JobFailed("job 1 is FAILED"), 1, "ldm: job 1 is FAILED"),
        (RuntimeError("far away\nKeyError: 'x'\n"), 1, "ldm: RuntimeError: KeyError: 'x' (run"),
        (AssertionError(), 1, "ldm: AssertionError (run with --verbose"),
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


def test_a_mistake_found_by_a_ray_task_is_the_users(capsys):
    error = RuntimeError("a remote traceback")
    error.cause = UserError(
        "size is 3\nFailed to apply UDF transform after 1/1 attempts\nTo change"
    )

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


def test_shapes_to_a_bucket(ldm, tmp_path, s3):
    import fsspec

    assert ldm("shapes", f"{s3}/cli/shapes", "--count", 3, "--size", 16).exit_code == 0
    ldm("shapes", "local", "--count", 3, "--size", 16)
    fs, root = fsspec.core.url_to_fs(f"{s3}/cli/shapes")
    there = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}
    assert there == files_under(tmp_path / "local")


def test_dry_runs_write_nothing(ldm, tmp_path):
    ldm("shapes", "data", "--count", 5, "--size", 16)
    before = files_under(tmp_path)
    words = ("image-tiny", "--data", "data", "--root", "run", "--dry-run")
    first = ldm("autoencoder", *words)
    assert "data  (there)" in first.stdout
    assert "run/autoencoder  (not made yet)" in first.stdout
    assert "6 of 8 samples" in first.stdout
    assert first.stdout.endswith("autoencoder: would run\n")
    second = ldm("encode", *words)
    assert "run/autoencoder  (missing)" in second.stdout
    assert "5, and 0 unusable" in second.stdout
    assert_mistake(second, "run/autoencoder", "ldm autoencoder")
    assert_mistake(ldm("encode", *words[:-1]), "run/autoencoder")  # leaves no text encoders behind
    pixels = ldm("encode", *words, "--set", "autoencoder.source=identity")
    assert pixels.stdout.endswith("encode: would run, and build the tiny text encoders\n")
    source = ldm("autoencoder", *words, "--set", "autoencoder.source=identity")
    assert source.stdout.endswith("autoencoder: has nothing to do\n")
    for stage in ("train", "distill", "evaluate"):
        later = ldm(stage, *words)
        assert_mistake(later, "run/")
        assert "(missing)" in later.stdout
    assert files_under(tmp_path) == before


def test_a_stage_names_the_next_one_and_a_dry_run_knows_that_it_is_done(ldm, tmp_path, monkeypatch):
    version = small_store(tmp_path / "my run" / "latents", shape=(2, 4, 4))
    words = ("image-tiny", "--root", "my run", "--set", "seed=5")

    def done(recipe, stage, product, sections, inputs, work, options):
        record = Record(
            stage=stage, digest=stage_digest(sections, inputs), run_id="r", tracking_uri="",
            product=product, inputs=inputs, seconds=3, summary={},
        )  # fmt: skip
        write_json(join(product, "record.json"), record.model_dump(mode="json"))
        return record

    assert ldm("train", *words, "--dry-run").stdout.endswith("train: would run\n")
    with monkeypatch.context() as patch:
        patch.setattr(train_denoiser, "run_stage", done)
        result = ldm("train", *words)
    assert result.stdout == "next: ldm distill image-tiny --root 'my run' --set seed=5\n"
    before = files_under(tmp_path)
    again = ldm("train", *words, "--dry-run").stdout
    assert "made by run r in 3s" in again
    assert again.endswith("train: is up to date (--force makes it again)\n")
    assert ldm("train", *words, "--dry-run", "--force").stdout.endswith("would run\n")
    for decides in ("train.steps=9", "train.guidance=3", "train.sample_steps=5", "precision=bf16"):
        changed = ldm("train", *words, "--set", decides, "--dry-run").stdout
        assert changed.endswith("would run\n"), decides
    with monkeypatch.context() as patch:  # what a former program made is of another network
        patch.setattr(train_denoiser, "FORMAT", 2)
        assert ldm("train", *words, "--dry-run").stdout.endswith("would run\n")
    for other in ("train.workers.count=1", "evaluate.teacher_steps=9", "distill.guidance=3"):
        same = ldm("train", *words, "--set", other, "--dry-run").stdout
        assert "up to date" in same, other
    assert files_under(tmp_path) == before
    version.store.publish(version.manifest)  # the same content under another number
    assert "up to date" in ldm("train", *words, "--dry-run").stdout


@pytest.mark.parametrize(
    ("caption", "stage"),
    [("a dog", "serve"), ("small red cross in the center, gray background", "evaluate")],
)
def test_what_can_be_evaluated_is_suggested(ldm, tmp_path, monkeypatch, caption, stage):
    small_store(tmp_path / "run" / "latents", captions=((caption,),))
    monkeypatch.setattr(distill_student, "distill_student", lambda *_: None)
    result = ldm("distill", "image-tiny", "--root", "run")
    assert result.stdout == f"next: ldm {stage} image-tiny --root run\n"


def text_of(file: Path) -> object:
    return json.loads(Image.open(file).info["ldm"])


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="here cuda can be used")
def test_sample_refuses_a_gpu_that_is_not_there(ldm):
    result = ldm("sample", "--model", "nowhere", "--prompt", "x", "--device", "cuda")
    assert_mistake(result, "--device cuda", "auto")


def test_serve_dry_run_prints_what_serve_deploy_takes(ldm, tmp_path):
    write_json(str(tmp_path / "run" / "student" / "config.json"), {})
    before = files_under(tmp_path)
    result = ldm("serve", "--root", "run", "--port", 8123, "--set", "serve.max_replicas=3",
                 "--dry-run")  # fmt: skip
    config = yaml.safe_load(result.stdout)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 8123}
    (application,) = config["applications"]
    assert application["args"]["model"] == str(tmp_path / "run" / "student")
    assert application["args"]["max_replicas"] == 3
    assert files_under(tmp_path) == before


def test_submit_dry_run_prints_the_line_without_secrets(ldm, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@mlflow")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", VARIABLES["MLFLOW_LOGGING_LEVEL"])  # by `quiet`
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # no dashboard
    (tmp_path / "vae").mkdir()
    (tmp_path / "my.json").write_text(ldm("show", "image-tiny").stdout)
    words = ("my.json", "--root", "s3://b/run", "--set", "autoencoder.source=vae")
    words += ("--set", "tracking_uri=https://me:hush@mlflow")
    result = ldm("submit", "encode", *words, "--force", "--pip", "emoji", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "hush" not in result.stdout
    line, entrypoint = result.stdout.strip().split(" -- ")
    ray, options = shlex.split(line)[:3], shlex.split(line)[3:]
    assert ray == ["ray", "job", "submit"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given["--address"] == "http://127.0.0.1:8265"
    assert given["--working-dir"] == str(tmp_path)
    env = json.loads(given["--runtime-env-json"])
    assert env["env_vars"] == {
        "AWS_SECRET_ACCESS_KEY": "***",
        "AWS_ENDPOINT_URL": "http://store:9000",
        "MLFLOW_TRACKING_URI": "https://***@mlflow",
    }
    assert env["pip"] == ["emoji"]
    assert {".venv", ".git"} <= set(env["excludes"])
    assert shlex.split(entrypoint)[1:] == [
        "-m", "pipelines.cli", "encode", "my.json",
        "--data", str(tmp_path / "demo" / "data"), "--root", "s3://b/run",
        "--set", "autoencoder.source=vae", "--set", "tracking_uri=https://***@mlflow",
        "--set", f"autoencoder.source={tmp_path / 'vae'}",
        "--force",
    ]  # fmt: skip
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "DEBUG")  # by the user
    far = ldm("submit", "train", "--address", "http://far:8265", "--dry-run").stdout
    assert "MLFLOW_LOGGING_LEVEL" in far
    assert " -- python -m pipelines.cli train image-s " in far
    assert '"pip"' not in far


def test_submit_without_a_cluster_is_a_mistake(ldm):
    assert_mistake(ldm("submit", "train", "--address", "http://127.0.0.1:9"), "ray start --head")
