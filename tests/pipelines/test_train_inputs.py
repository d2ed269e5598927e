"""What a training reads is resolved once, decides the digest, and stays for restarted workers."""

import json
from types import SimpleNamespace

import pytest
import torch
from bucket_store import STATISTICS, bucket_store
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file
from small_store import add_sample, small_store
from tiny_project import IDENTITY, model_config, random_network

from ldm_core.errors import UserError
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.store import LatentStore
from ldm_core.model_directory import Reference, read_config, save_model
from pipelines import train_denoiser, train_inputs
from pipelines.backbones import stored_space
from pipelines.denoiser_network import new_weights
from pipelines.recipe_options import Arguments
from pipelines.stage import Options
from pipelines.teacher_directory import save_teacher
from pipelines.tracking import tracking_uri
from pipelines.train_initial import check_not_overwritten
from pipelines.train_inputs import initial_model, initial_statistics, pinned
from pipelines.train_plan import plan_training
from pipelines.training_data import find_data, window_bytes

SHAPE = (2, 8, 8)
KNOWN = LatentStatistics(mean=(0.1, -0.2), std=(3.0, 4.0))


def recipe_of(root, *words: str):
    return Arguments("image-tiny", root=str(root), overrides=("size=8", *words)).resolve()


def mix_of(*uris: object) -> str:
    return f"train.mix={json.dumps([{'uri': str(uri), 'weight': 0.5} for uri in uris])}"


def model_for(version, uri, seed: int = 0, **changes) -> str:
    """A model directory that goes with a store, but has statistics of its own."""
    entries = {entry.name: entry for entry in version.manifest.texts}
    entries["autoencoder"] = version.manifest.autoencoder
    references = {
        name: Reference(uri=entry.uri, digest=entry.digest) for name, entry in entries.items()
    }
    config = model_config({"t5": IDENTITY, "clip": IDENTITY}).model_copy(
        update={
            **references,
            "backbone": plan_training(recipe_of("r"), stored_space(version)).backbone,
            "latents_mean": KNOWN.mean,
            "latents_std": KNOWN.std,
            "lineage": {"run": "the-run-before"},
            **changes,
        }
    )
    save_model(str(uri), config, random_network(config.backbone, seed).state_dict(), "")
    return str(uri)


@pytest.fixture
def own(tmp_path):
    return small_store(tmp_path / "run" / "latents", shape=SHAPE)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Runs `ldm train` up to the workers; returns the stage's context and what these were given."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(train_denoiser, "register_model", lambda *_: "1")
    seen = []

    def fit(context, worker, *_):
        seen.append((context, worker.args[0]))
        return {"digest": "d"}

    monkeypatch.setattr(train_denoiser, "fit", fit)

    def train(*words: str):
        train_denoiser.train_denoiser(recipe_of(tmp_path / "run", *words), Options())
        return seen.pop() if seen else None

    return train


def test_other_content_under_the_same_name_is_another_training(own, tmp_path, trained, monkeypatch):
    other = small_store(tmp_path / "other", shape=SHAPE, count=5)
    first = model_for(own, tmp_path / "first")
    registry = {"models:/a@champion": first}
    monkeypatch.setattr(train_inputs, "model_uri", lambda name: registry.get(name, name))
    words = (mix_of(tmp_path / "other"), "train.initial=models:/a@champion")

    context, data = trained(*words)
    assert context.inputs == {
        "latents": own.manifest.content[:16],
        "mix.1": other.manifest.content[:16],
        "initial": initial_model(first).digest,
    }
    assert context.recipe.train.initial == first  # what workers load, also if the name moves
    assert [share.version for share in context.recipe.train.mix] == [1]
    assert (data.weights, data.statistics) == ((1.0, 0.5), KNOWN)
    client = MlflowClient(tracking_uri(context.recipe))
    run = client.get_run(context.run.id)
    assert run.data.tags["parent.initial"] == "the-run-before"
    assert run.data.tags["input.initial"] == context.inputs["initial"]
    names = {each.dataset.name for each in run.inputs.dataset_inputs}
    assert names == {"latents", "mix.1"}

    assert trained(*words) is None  # up to date
    registry["models:/a@champion"] = model_for(own, tmp_path / "second", seed=1)
    moved, _ = trained(*words)
    assert moved.digest != context.digest
    number = add_sample(LatentStore(other.store.uri), "new.png", "a new one").number
    grown, data = trained(*words)
    assert grown.digest != moved.digest
    assert data.indexes[1].manifest.number == number == 2
    pinned_words = (words[0].replace('"weight"', '"version": 1, "weight"'), words[1])
    assert '"version": 1' in pinned_words[0]
    back, _ = trained(*pinned_words)
    assert back.digest == moved.digest


def test_to_hear_that_nothing_is_to_be_done_reads_no_weights(own, tmp_path, trained, monkeypatch):
    initial = model_for(own, tmp_path / "initial")
    words = (f"train.initial={initial}",)
    context, _ = trained(*words)
    with monkeypatch.context() as patch:
        patch.setattr(train_inputs, "read_bytes", pytest.fail)
        patch.setattr(train_denoiser, "check_autoencoder", pytest.fail)
        assert trained(*words) is None
    model_for(own, initial, seed=1)  # others of the same size, in the same place
    checked = []
    monkeypatch.setattr(train_denoiser, "check_autoencoder", checked.append)
    anew, _ = trained(*words)
    assert [version.manifest.content for version in checked] == [own.manifest.content]
    assert anew.inputs["initial"] == initial_model(initial).digest != context.inputs["initial"]


def test_the_version_that_was_pinned_is_read_whatever_is_published_since(own, tmp_path):
    other = small_store(tmp_path / "other", shape=SHAPE, count=5)
    recipe, mix = pinned(recipe_of(tmp_path / "run", mix_of(tmp_path / "other")))
    add_sample(LatentStore(other.store.uri), "new.png", "a new one")
    for data in (find_data(recipe, own, mix=mix), find_data(recipe, own)):
        assert data.indexes[1].manifest.content == other.manifest.content


def test_weights_go_on_seeing_latents_as_they_did(own, tmp_path):
    initial = model_for(own, tmp_path / "initial")
    recipe = recipe_of(tmp_path / "run", f"train.initial={initial}")
    with find_data(recipe, own).reader(recipe.train, 0) as reader:
        assert reader.statistics == KNOWN
        found = reader.batches(0)[0]
    plain = recipe_of(tmp_path / "run")
    with find_data(plain, own).reader(plain.train, 0) as reader:
        assert reader.statistics == own.manifest.statistics
        other = reader.batches(0)[0]
        raw = other.latents * reader.std.view(-1, 1, 1) + reader.mean.view(-1, 1, 1)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (KNOWN.mean, KNOWN.std))
    torch.testing.assert_close(found.latents * std + mean, raw)


def test_to_begin_with_the_own_product_is_refused(tmp_path, own, trained, monkeypatch):
    product = str(tmp_path / "run" / "teacher")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.setattr(train_inputs, "model_uri", {"models:/a@champion": product}.get)
    with pytest.raises(UserError, match=f"{product} is where this .* own model: copy it"):
        trained("train.initial=models:/a@champion")
    monkeypatch.setattr(train_inputs, "model_uri", str)
    linked = str(tmp_path / "link" / "teacher")
    with pytest.raises(UserError, match=f"{linked} is where this .* own model: copy it"):
        trained(f"train.initial={linked}")
    check_not_overwritten("s3://b/run/teacher-0", "s3://b/run/teacher")
    with pytest.raises(UserError, match="copy it"):
        check_not_overwritten("s3://b/run/teacher/", "s3://b/run/teacher")


def test_weights_that_were_put_there_since_are_not_begun_with(own, tmp_path):
    place = model_for(own, tmp_path / "initial")
    recipe = recipe_of(tmp_path / "run", f"train.initial={place}")
    before, config = initial_model(place).digest, read_config(place).backbone
    new_weights(recipe, config, before)
    now = initial_model(model_for(own, place, seed=1)).digest
    with pytest.raises(
        UserError, match=f"{place} now holds the model {now}, .* with {before}: put"
    ):
        new_weights(recipe, config, before)
    new_weights(recipe, config, now)


def test_a_diffusers_transformer(tmp_path):
    folder = tmp_path / "sd3"
    folder.mkdir()
    config = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": "1"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(2)}, folder / "diffusion_pytorch_model.safetensors")
    first = initial_model(str(folder))
    assert (first.run, initial_statistics(str(folder))) == (None, None)
    (folder / "config.json").write_text(json.dumps(config | {"_diffusers_version": "2"}))
    assert initial_model(str(folder)) == first
    save_file({"a": torch.zeros(2)}, folder / "diffusion_pytorch_model.safetensors")
    assert initial_model(str(folder)).digest != first.digest


def test_what_is_held_out_is_in_no_store_of_the_mix(tmp_path):
    """The second store has some of the first one's files, under the same ids."""
    both = ({"8x8x1": 12}, {"8x8x1": 20})
    own, _ = (
        bucket_store(tmp_path / str(k), counts, shapes={"8x8x1": SHAPE})
        for k, counts in enumerate(both)
    )
    recipe = recipe_of(tmp_path, mix_of(tmp_path / "1"), "train.validation_samples=4")
    data = find_data(recipe, own)
    counts = [int(index.samples.count.sum()) for index in (data.held_out, *data.indexes)]
    assert counts == [4, 8, 16]
    kept = find_data(recipe, own, hold=False)
    assert [int(index.samples.count.sum()) for index in kept.indexes] == [12, 20]
    assert kept.held_out is None


def test_the_windows_of_all_lanes_have_room_in_one_process():
    assert window_bytes(1) == window_bytes(16) == 256 * 2**20
    for parts in (17, 64, 4096):
        assert parts * window_bytes(parts) <= 2**32 < parts * (window_bytes(parts) + 1)


def test_the_sizes_and_the_lineage_of_the_teacher(tmp_path):
    shapes = {"8x8x1": SHAPE, "8x8x5": (2, 2, 8, 8), "8x16x1": (2, 8, 16)}
    counts = {"8x8x1": 3, "8x8x5": 2}
    version = bucket_store(tmp_path / "s", counts, shapes=shapes)
    words = ("train.buckets=[8x8x1,8x8x5]", "autoencoder.temporal_downsampling=4")
    recipe, product = recipe_of(tmp_path, *words), str(tmp_path / "teacher")
    inputs = {"latents": version.manifest.content[:16], "mix.1": "m", "initial": "i"}
    run = SimpleNamespace(id="r1")
    job = SimpleNamespace(recipe=recipe, run=run, product=product, inputs=inputs)
    backbone = plan_training(recipe, stored_space(version)).backbone
    weights = random_network(backbone).state_dict()
    for buckets, sizes in (((), ("8x8",)), (tuple(sorted(shapes)), ("8x8", "8x16"))):
        save_teacher(job, version, backbone, STATISTICS, weights, buckets)
        config = read_config(product)
        assert config.sizes == sizes
        assert {"mix.1": "m", "initial": "i", "run": "r1"}.items() <= config.lineage.items()
        assert "latents" not in config.lineage
