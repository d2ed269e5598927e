"""MLflow as the stages use it: where runs go, which one is gone on with."""

from pathlib import Path

import pytest

from ldm_core.errors import UserError
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe
from pipelines.tracking import tracking_uri


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
