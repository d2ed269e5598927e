"""MLflow as the stages use it: where runs go, which one is gone on with."""

import contextlib
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tiny_project import backbone, model_config, random_network

from ldm_core.errors import UserError
from ldm_core.model_directory import Reference, save_model
from pipelines import tracking
from pipelines.commands import command
from pipelines.credentials import masked
from pipelines.model_registry import register_model, resolve_model
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options, checkpoint_place, forget_record, run_stage
from pipelines.tracking import track, tracking_uri

TEXTS = {name: Reference(uri=f"/far/away/{name}", digest=f"of {name}") for name in ("t5", "clip")}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return RECIPES["image-tiny"]().model_copy(update={"root": str(tmp_path / "root")})


def test_a_cluster_that_works_on_a_bucket_needs_a_server(recipe, tmp_path, monkeypatch):
    in_bucket = recipe.model_copy(update={"root": "s3://bucket/run"})
    assert tracking_uri(in_bucket) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert tracking_uri(recipe) == f"sqlite:///{tmp_path}/root/mlflow.db"
    with pytest.raises(UserError, match=r"s3://bucket/run.*10\.0\.0\.1.*MLFLOW_TRACKING_URI"):
        tracking_uri(in_bucket)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri(in_bucket) == "http://mlflow:5000"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:hush@mlflow:5000/a@b", "https://***@mlflow:5000/a@b"),
        ("--set tracking_uri=http://me:hu@sh@host x@y", "--set tracking_uri=http://***@host x@y"),
        ('{"root": "s3://bucket", "to": "me@host"}', '{"root": "s3://bucket", "to": "me@host"}'),
        ("http://me:hu'sh@host", "http://***@host"),
        ("sqlite:////project/me@home/mlflow.db", "sqlite:////project/me@home/mlflow.db"),
    ],
)
def test_credentials_are_masked_and_nothing_else(text, shown):
    assert masked(text) == shown


def test_no_password_is_written_down(recipe, monkeypatch):
    secret = recipe.model_copy(update={"tracking_uri": "http://me:hush@mlflow"})
    here = MlflowClient(tracking_uri(recipe))
    monkeypatch.setattr(tracking, "client_of", lambda _: here)  # that server is not there
    product = recipe.product("teacher")
    record = run_stage(secret, "train", product, {}, {}, lambda _: {}, Options())
    artifact = Path(here.download_artifacts(record.run_id, "recipe.json")).read_text()
    for text in (artifact, Path(product, "record.json").read_text(), command(secret, "train")):
        assert "http://***@mlflow" in text
        assert "hush" not in text


def test_a_run_has_the_settings_of_its_stage(recipe):
    source = "s3://me:hush@store/" + "x" * 9000
    text = recipe.text.model_copy(update={"t5": source})
    with track(recipe.model_copy(update={"text": text}), "train", "digest", "/a") as run:
        pass
    params = run.client.get_run(run.id).data.params
    assert (params["train.steps"], params["train.workers.count"]) == ("8", "2")
    assert (params["seed"], params["precision"], params["train.compile"]) == ("0", "auto", "false")
    assert source.replace("me:hush", "***").startswith(params["text.t5"])
    assert not {key for key in params if key.startswith(("distill.", "autoencoder."))}


def test_a_run_gone_on_with_keeps_the_settings_it_began_with(recipe):
    def run_with(log_every: int) -> tuple[str, str]:
        train = recipe.train.model_copy(update={"log_every": log_every})
        with (
            contextlib.suppress(RuntimeError),
            track(recipe.model_copy(update={"train": train}), "train", "digest", "/a") as run,
        ):
            raise RuntimeError("killed")
        return run.id, run.client.get_run(run.id).data.params["train.log_every"]

    assert run_with(3) == run_with(4)


def test_a_run_is_gone_on_with_for_the_same_product_alone(recipe):
    def run_of(product: str, ends: bool) -> str:
        with contextlib.suppress(RuntimeError), track(recipe, "train", "digest", product) as run:
            if not ends:
                raise RuntimeError("killed")
        return run.id

    first = run_of("/a/it's", ends=False)
    assert run_of("/b/teacher", ends=True) != first
    assert run_of("/a/it's", ends=True) == first
    assert run_of("/a/it's", ends=True) != first  # that one is finished


def test_a_version_whose_folder_holds_a_later_model_is_refused(recipe):
    product = recipe.product("student")

    def make(seed: int, killed: bool = False) -> str:
        def work(context) -> dict[str, str]:
            weights = random_network(backbone(), seed).state_dict()
            digest = save_model(product, model_config(TEXTS), weights, "a card")
            if killed:
                raise RuntimeError("before it is registered")
            register_model(context.run, "shapes", product, digest, "champion")
            return {"digest": digest}

        record = run_stage(recipe, "distill", product, {"of": seed}, {}, work, Options())
        return record.summary["digest"]

    registry = tracking_uri(recipe)
    first = make(1)
    assert resolve_model("models:/shapes/1", registry) == product
    second = make(2)
    for name in ("models:/shapes/2", "models:/shapes@champion"):
        assert resolve_model(name, registry) == product
    with pytest.raises(UserError, match=f"shapes/1 is the model {first}, .*holds {second}"):
        resolve_model("models:/shapes/1", registry)
    with pytest.raises(RuntimeError, match="registered"):
        make(3, killed=True)
    with pytest.raises(UserError, match=f"champion is the model {second}, "):
        resolve_model("models:/shapes@champion", registry)
    for nothing in ("models:/shapes/3", "models:/shapes@best", "models:/shapes"):
        with pytest.raises(UserError, match="has no models:/shapes"):
            resolve_model(nothing, registry)


def test_what_is_half_made_is_not_taken_for_what_was_there(recipe):
    """Nor for a product of settings gone back to; and only `force` throws its checkpoints away."""
    product = recipe.product("autoencoder")

    def work(context) -> dict[str, str]:
        checkpoint = Path(*checkpoint_place(recipe, product, context.digest), "half")
        resumed = checkpoint.exists()
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.touch()
        if killed and not writing:
            raise RuntimeError("killed")
        forget_record(product)
        if killed:
            raise RuntimeError("killed while it wrote")
        return {"resumed": resumed}

    def run(steps: int, force: bool = False) -> dict[str, bool]:
        sections = {"steps": steps}
        record = run_stage(recipe, "autoencoder", product, sections, {}, work, Options(force=force))
        return record.summary

    killed = writing = False
    assert run(1) == {"resumed": False}
    killed = writing = True
    for again in ({"steps": 2}, {"steps": 1}, {"steps": 1, "force": True}):
        with pytest.raises(RuntimeError):
            run(**again)
    killed = writing = False
    assert run(1) == {"resumed": True}
    killed = True
    with pytest.raises(RuntimeError):
        run(1, force=True)
    killed = False
    assert run(1) == {"resumed": True}  # what was begun by force is gone on with
    assert run(2, force=True) == {"resumed": False}
    assert not list(Path(recipe.root, "checkpoints").glob("autoencoder-*/*"))


def test_a_run_that_fails_before_it_writes_leaves_the_former_product_finished(recipe, capsys):
    product = recipe.product("teacher")

    def run(steps: int, work=lambda _: {}) -> str:
        run_stage(recipe, "train", product, {"steps": steps}, {}, work, Options())
        return capsys.readouterr().out

    def refused(_) -> dict:
        raise UserError("train needs 99 CPU")

    run(1)
    with pytest.raises(UserError):
        run(2, refused)
    assert "up to date" in run(1, pytest.fail)


def test_without_its_server_a_finished_product_keeps_its_record(recipe):
    product = recipe.product("teacher")
    record = Path(product, "record.json")
    run_stage(recipe, "train", product, {}, {}, lambda _: {}, Options())
    before = record.read_text()
    gone = recipe.model_copy(update={"tracking_uri": "http://me:hush@127.0.0.1:1"})
    with pytest.raises(UserError, match=r"no MLflow server answers at http://\*\*\*@127.0.0.1:1"):
        run_stage(gone, "train", product, {"other": 1}, {}, pytest.fail, Options())
    assert record.read_text() == before
