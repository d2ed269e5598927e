"""Fixtures of the pipelines' tests."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from pipelines import cli_options
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
