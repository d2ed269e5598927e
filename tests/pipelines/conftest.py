"""Fixtures of the pipelines' tests."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from made_once import made_once
from typer.testing import CliRunner, Result

from pipelines import cli_options, model_registry, tracking
from pipelines.cli import app

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


@pytest.fixture(scope="session", autouse=True)
def _databases(shared_folder: Path) -> Iterator[None]:
    """MLflow makes one database of the test run; the others are copies, as that takes seconds."""
    real = tracking.client_of

    def make(folder: Path) -> None:
        real(f"sqlite:///{folder}/mlflow.db").search_experiments()

    def client_of(uri: str | None) -> object:
        scheme, _, path = (uri or "").partition(":///")
        if scheme == "sqlite" and not Path(path).exists():
            shutil.copy(made_once(shared_folder, "mlflow", make) / "mlflow.db", path)
        return real(uri)

    with pytest.MonkeyPatch.context() as patch:
        for module in (tracking, model_registry):
            patch.setattr(module, "client_of", client_of)
        yield
