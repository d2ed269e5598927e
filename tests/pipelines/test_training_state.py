"""A worker's side of the checkpoints: from which of them training goes on."""

from types import SimpleNamespace

import pytest
import torch

from ldm_core.training.checkpoint_folder import step_of
from ldm_core.training.optimizers import Optimizers
from ldm_core.training.step import TrainingStep
from pipelines import training_state
from pipelines.training_state import Resuming


@pytest.fixture
def resuming(monkeypatch, tmp_path) -> Resuming:
    """Of a small network, alone."""
    monkeypatch.setattr(training_state.ray, "get", lambda value: value)
    network = torch.nn.Linear(2, 2)
    optimizers = Optimizers(torch.optim.SGD(network.parameters(), lr=0.1))
    update = TrainingStep(network, optimizers, torch.device("cpu"), torch.float32, 1.0)
    job = SimpleNamespace(
        run=SimpleNamespace(untold=list),
        checkpoints=str(tmp_path),
        begin=lambda first, seconds: first,
        board=SimpleNamespace(seconds=SimpleNamespace(remote=lambda: 0.0)),
    )
    return Resuming(job, update, {}, {"class": "Linear"})


def saved(resuming: Resuming, step: int, value: float, **facts: object) -> None:
    torch.nn.init.constant_(resuming.update.network.weight, value)
    resuming.save(step, facts)
    resuming.wait()


def test_a_checkpoint_that_lacks_what_was_to_come_after_it_goes_and_the_one_before_is_taken(
    resuming, tmp_path
):
    saved(resuming, 3, 3.0)
    saved(resuming, 5, 5.0, lacks="something")
    assert resuming.restore(lambda facts: facts["lacks"] == "something") == 5
    assert resuming.restore(lambda facts: "lacks" not in facts) == 3
    assert (resuming.update.network.weight == 3.0).all()
    [left] = tmp_path.iterdir()
    assert step_of(left.name) == 3
    assert resuming.restore(lambda facts: False) == 0
    assert not list(tmp_path.iterdir())
