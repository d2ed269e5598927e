"""What is half written is no product: every stage forgets its record before its first write."""

from types import SimpleNamespace

import pytest
import torch
from small_store import small_store
from tiny_project import IDENTITY, model_config
from tiny_runs import tiny_recipe

from ldm_core.autoencoders.training import new_autoencoder
from ldm_core.backbones.dit import DiT
from ldm_core.files import join, write_json
from ldm_core.latents.store import LatentStore
from ldm_core.media.folder import list_captioned_images
from ldm_core.media.shapes import write_shapes
from ldm_core.training.ema import Ema
from pipelines import distill_student, encode_latents, evaluate_model, teacher_directory
from pipelines import train_autoencoder as autoencoder_stage
from pipelines.backbones import backbone_config
from pipelines.encode_changes import Changes
from pipelines.picture_reader import Pictures
from pipelines.stage import Record, read_record


class Killed(Exception):
    """At the first byte."""


def die(*_: object) -> None:
    raise Killed


def nothing(*_: object) -> None:
    """What a run is told is of no interest here."""


RUN = SimpleNamespace(id="r2", metrics=nothing, image=nothing, file=nothing)


def recorded(product: str) -> str:
    """A product whose former run was finished."""
    record = Record(
        stage="any", digest="d", run_id="r1", tracking_uri="", product=product, inputs={},
        seconds=1, summary={},
    )  # fmt: skip
    write_json(join(product, "record.json"), record.model_dump(mode="json"))
    return product


@pytest.fixture
def version(tmp_path):
    return small_store(tmp_path / "latents", shape=(2, 8, 8))


@pytest.fixture
def job(tmp_path):
    recipe = tiny_recipe(str(tmp_path / "data"), str(tmp_path))
    product = recorded(str(tmp_path / "product"))
    return SimpleNamespace(recipe=recipe, product=product, run=RUN, inputs={})


def test_autoencoder(job, tmp_path, monkeypatch):
    write_shapes(tmp_path / "data", 8, 16, seed=0)
    pictures = Pictures(list_captioned_images(job.recipe.data).images, 16, seed=0)
    network = new_autoencoder((8, 8, 8), 2, 1, 16, 0)
    monkeypatch.setattr(autoencoder_stage, "upload_folder", die)
    with pytest.raises(Killed):
        autoencoder_stage._finish(job, network, pictures, torch.device("cpu"))
    assert read_record(job.product) is None


def test_encode(version, monkeypatch):
    store = LatentStore(recorded(version.store.uri))
    manifest = version.manifest.model_copy(update={"max_tokens": 5})
    monkeypatch.setattr(LatentStore, "publish", die)
    with pytest.raises(Killed):
        encode_latents._publish_if_new(store, manifest, Changes(0, 0, 0, 0), retried=False)
    assert read_record(store.uri) is None


def test_teacher(job, version, monkeypatch):
    backbone = backbone_config(job.recipe.train, (2, 8, 8), 8, 8)
    monkeypatch.setattr(teacher_directory, "save_model", die)
    with pytest.raises(Killed):
        teacher_directory.save_teacher(job, version, backbone, version.manifest.statistics, {})
    assert read_record(job.product) is None


def test_student(job, version, monkeypatch):
    lineage = {"run": "r1", "store": version.store.uri, "store_version": "1"}
    teacher = model_config({"t5": IDENTITY, "clip": IDENTITY}).model_copy(
        update={"lineage": lineage}
    )
    network = DiT(teacher.backbone)
    monkeypatch.setattr(distill_student, "save_model", die)
    with pytest.raises(Killed):
        distill_student.save_student(job, version, teacher, "d", network, Ema(network, 0.9))
    assert read_record(job.product) is None


def test_evaluate(job, monkeypatch):
    scores = SimpleNamespace(model_dump_json=lambda indent: "{}", entries=[])
    monkeypatch.setattr(evaluate_model, "plot_steps", lambda _: b"")
    monkeypatch.setattr(evaluate_model, "upload_folder", die)
    with pytest.raises(Killed):
        evaluate_model.publish(scores, {}, job)
    assert read_record(job.product) is None
