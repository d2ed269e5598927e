"""A machine's load in the run, whatever becomes of the server."""

import time

import pytest
from mlflow.tracking import MlflowClient

from pipelines.recipes import RECIPES
from pipelines.system_metrics import sampled
from pipelines.tracking import Run, track

CPU = "system/node-1/cpu_utilization_percentage"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> str:
    """One for all tests here: MLflow takes seconds to make its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('server')}/mlflow.db"


@pytest.fixture
def run(tmp_path, server):
    update = {"root": str(tmp_path), "tracking_uri": server}
    recipe = RECIPES["image-tiny"]().model_copy(update=update)
    with track(recipe, "train", "digest", "/a") as run:
        yield run


def told(run: Run, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(run.uri).get_metric_history(run.id, name)
    return sorted((metric.step, metric.value) for metric in history)


def test_each_node_tells_its_load_and_goes_on_after_a_restart(run):
    with sampled(run, 1):
        sum(k * k for k in range(200_000))
    [(step, load)] = told(run, CPU)  # one at the end, however short it was
    assert (step, 0 < load <= 100) == (0, True)
    with sampled(run, 1, every=0.01):
        deadline = time.monotonic() + 30
        while len(told(run, CPU)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    steps = [step for step, _ in told(run, CPU)]
    assert len(steps) >= 3
    assert steps == [*range(len(steps))]
    found = MlflowClient(run.uri).get_run(run.id).data
    assert found.tags["system.node-1"]
    names = {name.rpartition("/")[2] for name in found.metrics if name.startswith("system/node-1/")}
    assert {"system_memory_usage_percentage", "disk_usage_percentage"} <= names


def test_a_worker_that_is_not_the_first_of_its_node_tells_nothing(run):
    with sampled(run, None):
        pass
    assert not MlflowClient(run.uri).get_run(run.id).data.metrics


def test_a_server_that_is_away_costs_samples_alone(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with sampled(Run("http://me:hush@127.0.0.1:1", "a" * 32), 0):
        done = True
    assert done
    said = capsys.readouterr().out
    assert said.count("no system metrics of node-0 for now") == 1
    assert "hush" not in said
