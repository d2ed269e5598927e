"""Whole trainings in this process: where they end, and who becomes the champion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import SIZE, encode_here, tiny_recipe, train_here

from ldm_core.errors import UserError
from ldm_core.media.shapes import write_shapes
from ldm_core.model_directory import load_model
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_tensors import read_tensors
from pipelines import denoiser_worker, training_data
from pipelines.model_registry import resolve_model
from pipelines.stage import Options, read_record
from pipelines.teacher_directory import save_teacher
from pipelines.tracking import tracking_uri
from pipelines.train_denoiser import train_denoiser
from pipelines.validation import Validator

STEPS, SAMPLES = 6, 6


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """An encoded data set; a recipe of it with settings of its own, in a root of its own."""
    place = tmp_path_factory.mktemp("project")
    write_shapes(place / "data", 24, SIZE, seed=0)

    def recipe(name: str, **train):
        settings = {
            "steps": 40, "validate_every": 2, "checkpoint_every": 2, "sample_every": 1000,
            "log_every": 1, "validation_samples": SAMPLES, "schedule": "constant",
            "sample_steps": 1, "micro_batches": 1,
        }  # fmt: skip
        made = tiny_recipe(str(place / "data"), str(place / name), 1, train=settings | train)
        if not Path(made.root).exists():
            Path(made.root).mkdir()
            for product in ("latents", "text"):
                Path(made.root, product).symlink_to(place / "encoded" / product)
        return made.model_copy(update={"model_name": name})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patch.delenv("RAY_ADDRESS", raising=False)
        encode_here(tiny_recipe(str(place / "data"), str(place / "encoded")))
        yield recipe


def test_the_model_is_that_of_the_step_it_ended_at(project, monkeypatch):
    """After a kill between two checkpoints, and another one when the model was to be written."""
    plain = train_here(train_denoiser, project("plain", steps=STEPS))
    assert "ended" not in plain.summary
    losses = {2: 0.5, 4: 0.75, 6: 0.25}  # the last comes too late to count
    asked, deadly = [], [4]

    def loss(self, weights, step):
        if asked.append(step) or (step in deadly and deadly.remove(step) is None):
            raise RuntimeError("killed")
        return {"validation_loss": losses[step]}

    monkeypatch.setattr(Validator, "loss", loss)
    recipe = project("ended", patience=1)
    with pytest.raises(Exception, match="killed"):
        train_here(train_denoiser, recipe)
    with monkeypatch.context() as broken:
        broken.setattr(denoiser_worker, "save_teacher", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            train_here(train_denoiser, recipe)
    record = train_here(train_denoiser, recipe)
    assert asked == [2, 4, 2, 4, 6, 6]  # those of a checkpoint's own step twice
    assert record.summary["steps"] == STEPS
    assert record.summary["ended"].startswith("1 validations since step 2 without a loss below 0.5")
    assert record.summary["final_validation_loss"] == losses[STEPS]
    assert record.summary["digest"] == plain.summary["digest"]
    assert f"for {STEPS} steps of" in Path(recipe.product("teacher"), "README.md").read_text()


def test_training_registers_what_it_measured(project, capsys):
    """Two trainings of one root on the same rows, of which the second learns nothing."""
    settings = {"steps": 4, "promote": "better"}
    good = train_here(train_denoiser, project("champions", **settings))
    frozen = settings | {"learning_rate": 1e-12}
    recipe = project("champions", **frozen)
    bad = train_here(train_denoiser, recipe)
    said = capsys.readouterr().out
    losses = [record.summary["final_validation_loss"] for record in (good, bad)]
    assert losses[0] < losses[1]
    assert good.summary["held_out"] == bad.summary["held_out"]
    assert "champions-teacher version 1 is the champion" in said
    assert (
        "champions-teacher version 2 does not become the champion: its validation loss is" in said
    )
    place = resolve_model("models:/champions-teacher@champion", tracking_uri(recipe))
    assert load_model(place)[2] == good.summary["digest"]
    assert read_record(recipe.product("teacher")).summary["digest"] == bad.summary["digest"]


def test_averaged_weights_are_the_model_and_are_judged_alike_at_any_step(project, monkeypatch):
    """The pictures are of the same captions and noise, the loss of the same rows and noise."""
    seen: list[dict[str, object]] = []

    def show(self, weights, step):
        if step == STEPS:
            other = {name: weight + 0.1 for name, weight in weights.items()}
            sheets = [shown(self, *each).sheet for each in ((weights, step), (weights, 9))]
            losses = [self.loss(*each) for each in ((weights, step), (weights, 9))]
            assert np.array_equal(*sheets)
            assert losses[0] == losses[1]
            assert not np.array_equal(shown(self, other, step).sheet, sheets[0])
            assert self.loss(other, step) != losses[0]
            seen.append(weights)
        return shown(self, weights, step)

    def save(job, *rest):
        last = newest(job.checkpoints)
        seen.extend(read_tensors(last, kind) for kind in ("average/model/", "model/"))
        return save_teacher(job, *rest)

    shown = Validator.show
    monkeypatch.setattr(Validator, "show", show)
    monkeypatch.setattr(denoiser_worker, "save_teacher", save)
    recipe = project("averaged", steps=STEPS, sample_every=STEPS)
    train_here(train_denoiser, recipe)
    judged, average, raw = seen
    model = load_model(recipe.product("teacher"))[1].state_dict()
    assert judged.keys() == average.keys() == raw.keys() == model.keys()
    for name, weight in average.items():
        assert torch.equal(judged[name], weight)
        assert torch.equal(model[name], weight)
    assert any(not torch.equal(judged[name], weight) for name, weight in raw.items())


def test_a_checkpoint_of_another_order_is_refused_before_workers_begin(project, monkeypatch):
    recipe = project("reordered", steps=STEPS)
    with monkeypatch.context() as broken:
        broken.setattr(denoiser_worker, "save_teacher", lambda *_: 1 / 0)
        with pytest.raises(Exception, match="division by zero"):
            train_here(train_denoiser, recipe)
    monkeypatch.setattr(training_data, "WINDOW_BYTES", 5000)  # as of another version of this code
    monkeypatch.setattr("pipelines.train_denoiser.fit", lambda *_: pytest.fail("workers began"))
    with pytest.raises(UserError, match=r"checkpoint of architecture .*\(order .* there"):
        train_denoiser(recipe, Options())
