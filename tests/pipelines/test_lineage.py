"""Runs under the run that made what they read, as MLflow shows and searches them."""

from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from small_store import add_sample, small_store

from ldm_core.latents.store import LatentStore
from pipelines.lineage import encode_run, tell_parents
from pipelines.recipes import RECIPES
from pipelines.stage import Options, run_stage
from pipelines.tracking import Run, track, tracking_uri

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> str:
    """One for all tests here: MLflow takes seconds to make its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('server')}/mlflow.db"


@pytest.fixture
def recipe(tmp_path, server):
    update = {"root": str(tmp_path), "tracking_uri": server}
    return RECIPES["image-tiny"]().model_copy(update=update)


@pytest.fixture
def version(recipe):
    return small_store(recipe.product("latents"))


@pytest.fixture
def encoded(recipe, version) -> str:
    """The run that published the store's version."""
    summary = {"version": version.number}
    store = recipe.product("latents")
    record = run_stage(recipe, "encode", store, {}, {}, lambda _: summary, Options())
    return record.run_id


def train(recipe, version, initial: str | None = None, name: str = "a") -> Run:
    with track(recipe, "train", name, "/teacher") as run:
        tell_parents(run, version, SimpleNamespace(run=initial) if initial else None)
    return run


def tags(run: Run) -> dict[str, str]:
    return MlflowClient(run.uri).get_run(run.id).data.tags


def test_a_training_is_under_the_run_that_encoded_its_latents(recipe, version, encoded):
    run = train(recipe, version)
    assert (tags(run)[PARENT], tags(run)["parent.latents"]) == (encoded, encoded)
    client = MlflowClient(tracking_uri(recipe))
    experiment = client.get_experiment_by_name(recipe.experiment).experiment_id
    found = client.search_runs([experiment], f"tags.`{PARENT}` = '{encoded}'")
    assert [each.info.run_id for each in found] == [run.id]  # what the UI asks for
    found = client.search_runs([experiment], f"tags.`parent.latents` = '{encoded}'")
    assert [each.info.run_id for each in found] == [run.id]


def test_one_that_starts_from_a_model_is_under_that_models_run(recipe, version, encoded):
    first = train(recipe, version)
    second = train(recipe, version, initial=first.id, name="b")
    known = tags(second)
    assert known[PARENT] == known["parent.initial"] == first.id
    assert known["parent.latents"] == encoded


def test_a_model_of_another_server_is_named_and_not_nested_under(recipe, version, encoded):
    known = tags(train(recipe, version, initial="0" * 32))
    assert (known["parent.initial"], known[PARENT]) == ("0" * 32, encoded)


def test_a_deleted_run_is_nobodys_parent(recipe, version, encoded):
    MlflowClient(tracking_uri(recipe)).delete_run(encoded)
    known = tags(train(recipe, version))
    assert PARENT not in known
    assert known["parent.latents"] == encoded


def test_the_record_is_of_the_newest_version_alone(recipe, version, encoded):
    newer = add_sample(LatentStore(version.store.uri), "new.png", "a new one")
    assert encode_run(version) == encoded
    assert encode_run(newer) is None
    assert PARENT not in tags(train(recipe, newer))
