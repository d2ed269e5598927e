"""What a stage prints besides its work: dry runs, the next command, what is served or submitted."""

import json
import os
import shlex

import pytest
import yaml
from command_line import assert_mistake, files_under
from small_store import small_store
from tiny_project import IDENTITY, model_config

from ldm_core.files import join, write_json
from pipelines import distill_student, train_denoiser
from pipelines.quiet import VARIABLES
from pipelines.stage import Record, stage_digest


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
    assert "5 pictures, 0 videos, and 0 unusable" in second.stdout
    assert_mistake(second, "run/autoencoder", "ldm autoencoder")
    assert_mistake(ldm("encode", *words[:-1]), "run/autoencoder")  # leaves no text encoders behind
    pixels = ldm("encode", *words, "--set", "autoencoder.source=identity")
    assert pixels.stdout.endswith("encode: would run, and build the tiny text encoders\n")
    for told in (" worker-hours ", " bytes ", "5 of 5 that are new or changed, in this process"):
        assert told in pixels.stdout
    source = ldm("autoencoder", *words, "--set", "autoencoder.source=identity")
    assert source.stdout.endswith("autoencoder: has nothing to do\n")
    planned = ldm("train", *words)
    assert "run/latents  (missing)" in planned.stdout
    assert planned.stdout.endswith(f"would run once there is a store at {tmp_path}/run/latents\n")
    for stage in ("distill", "evaluate"):
        later = ldm(stage, *words)
        assert_mistake(later, "run/")
        assert "(missing)" in later.stdout
    assert files_under(tmp_path) == before


def test_a_stage_names_the_next_one_and_a_dry_run_knows_that_it_is_done(ldm, tmp_path, monkeypatch):
    version = small_store(tmp_path / "my run" / "latents", shape=(2, 8, 8))
    words = ("image-tiny", "--root", "my run", "--set", "size=8")

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
    assert result.stdout == "next: ldm distill image-tiny --root 'my run' --set size=8\n"
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


def test_serve_dry_run_prints_what_serve_deploy_takes(ldm, tmp_path):
    config = model_config({"t5": IDENTITY, "clip": IDENTITY}, "student")
    write_json(str(tmp_path / "run" / "student" / "config.json"), config.model_dump(mode="json"))
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
    words += ("--set", "tracking_uri=https://me:hush@tracker")
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
        "MLFLOW_TRACKING_URI": "https://***@tracker",
    }
    assert env["pip"] == ["emoji"]
    assert {".venv", ".git", "/demo/data"} <= set(env["excludes"])
    assert shlex.split(entrypoint)[1:] == [
        "-m", "pipelines.cli", "encode", "my.json",
        "--data", str(tmp_path / "demo" / "data"), "--root", "s3://b/run",
        "--set", "autoencoder.source=vae",
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
