"""`ldm export`: what diffusers reads computes the same, and averages of any length are models."""

import functools
import json
from pathlib import Path

import pytest
import tiny_diffusers as tiny
import torch
from command_line import assert_mistake, files_under
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from small_store import small_store
from tiny_project import model_config, text_references, tiny_project
from tiny_runs import train_here

from ldm_core.backbones.diffusers_adapter import load_diffusers
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.files import read_json, write_json
from ldm_core.model_directory import load_model, save_model
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_snapshots import average_of_length, snapshots_at
from ldm_core.training.checkpoint_tensors import read_tensors
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options
from pipelines.train_denoiser import train_denoiser

FLUX = {"rotary": (2, 2, 4), "single_depth": 1}
STEPS, EVERY = 12, 2


def mmdit_model(root: Path, **changes: object) -> str:
    """A model directory of an MMDiT with random weights."""
    config = MMDiTConfig(
        in_channels=4, patch_size=2, width=16, depth=2, heads=2, text_width=tiny.TEXT,
        pooled_width=tiny.POOLED, **changes,
    )  # fmt: skip
    whole = model_config(text_references(str(root))).model_copy(update={"backbone": config})
    save_model(f"{root}/model", whole, tiny.shaken(MMDiT(config)).state_dict(), "# The card\n")
    return f"{root}/model"


@pytest.mark.parametrize("changes", [{}, FLUX], ids=["sd3", "flux"])
@torch.no_grad()
def test_diffusers_reads_what_computes_the_same(ldm, tmp_path, changes):
    model = mmdit_model(tmp_path, **changes)
    result = ldm("export", model, "out/transformer")
    assert result.exit_code == 0, result.output
    config, ours, digest = load_model(model)
    x, t, cond = tiny.latents("sd3"), torch.tensor([0.25, 0.9]), tiny.captions()
    expected = ours(x, t, cond)
    theirs = FluxTransformer2DModel if changes else SD3Transformer2DModel
    assert f"diffusers.{theirs.__name__}.from_pretrained('out/transformer')" in result.stdout
    read = theirs.from_pretrained("out/transformer")
    if not changes:  # as its pipeline calls it; a Flux is given packed latents
        found = read(
            x, timestep=1000 * t, encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled
        ).sample
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        load_diffusers("out/transformer")(x, t, cond), expected, rtol=0, atol=1e-5
    )
    card = Path("out/transformer/README.md").read_text()
    for words in (digest, config.t5.digest, "0.1, -0.2, 0.05", theirs.__name__, "# The card"):
        assert words in card


def test_to_a_bucket_and_back_into_a_model_directory(ldm, tmp_path, s3):
    model = mmdit_model(tmp_path)
    assert ldm("export", model, f"{s3}/export/copy", "--to", "ldm").exit_code == 0
    copied, first = load_model(f"{s3}/export/copy"), load_model(model)
    assert copied[2] == first[2]
    assert copied[0].t5 == first[0].t5
    result = ldm("export", f"{s3}/export/copy", f"{s3}/export/transformer")
    assert result.exit_code == 0, result.output
    assert "SD3Transformer2DModel" in result.stdout
    assert read_json(f"{s3}/export/transformer/config.json")["num_layers"] == 2


def test_a_file_uri_is_the_place_it_names(ldm, tmp_path):
    model = mmdit_model(tmp_path / "models")
    for form, weights in (("diffusers", "diffusion_pytorch_model"), ("ldm", "model")):
        result = ldm("export", model, f"file://{tmp_path}/{form}", "--to", form)
        assert result.exit_code == 0, result.output
        assert (tmp_path / form / f"{weights}.safetensors").is_file()
        assert (tmp_path / form / "config.json").is_file()
    assert not (tmp_path / "file:").exists()
    told = ldm("export", model, f"file://{tmp_path}/again").stdout
    assert f"SD3Transformer2DModel.from_pretrained('{tmp_path}/again')" in told


def test_a_dit_is_refused_with_what_can_be_done(ldm, tmp_path):
    model = tiny_project(tmp_path / "project")
    before = files_under(tmp_path)
    said = ("is a DiT, for which diffusers has no class", "--to ldm", "train.backbone=mmdit")
    assert_mistake(ldm("export", model, "out"), *said)
    assert_mistake(ldm("export", model, "out", "--average", 0.05, "--to", "diffusers"), *said)
    assert files_under(tmp_path) == before


def test_mistakes(ldm, tmp_path):
    model, student = (tiny_project(tmp_path / kind, kind) for kind in ("teacher", "student"))
    assert_mistake(ldm("export", "nowhere", "out"), "no model at nowhere")
    assert_mistake(ldm("export", model, student, "--to", "ldm"), student, "already holds a model")
    assert_mistake(ldm("export", model, "out", "--average", 0.4), "--average 0.4", "0.2887")
    assert_mistake(ldm("export", model, "out", "--to", "onnx"), "onnx")
    assert_mistake(
        ldm("export", model, "out", "--average", 0.07), "kept no snapshots", "train.ema_lengths"
    )
    assert_mistake(ldm("export", student, "out", "--average", 0.07), "is a student", "distil")
    assert not Path("out").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Recipe:
    """A teacher that was trained to its end, with snapshots of two averages."""
    root = tmp_path_factory.mktemp("trained")
    small_store(root / "latents", shape=(3, 8, 8))
    sets = (
        "size=8", "precision=fp32", "autoencoder.source=identity", "train.workers.count=1",
        f"train.steps={STEPS}", "train.batch_size=4", f"train.checkpoint_every={EVERY}",
        f"train.sample_every={STEPS}", "train.sample_steps=2", "train.ema_lengths=[0.05,0.1]",
    )  # fmt: skip
    recipe = Arguments("image-tiny", root=str(root), overrides=sets).resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        train_here(train_denoiser, recipe)
        first = snapshots_at(str(snapshots(recipe)))

        @functools.wraps(train_denoiser)
        def again(recipe: Recipe, _: Options):
            return train_denoiser(recipe, Options(force=True))

        train_here(again, recipe)
    second = snapshots_at(str(snapshots(recipe)))
    assert len(first) == len(second) == 2 * STEPS // EVERY  # and none of the run before
    assert not {each.checkpoint.uri for each in first} & {each.checkpoint.uri for each in second}
    return recipe


def snapshots(recipe: Recipe) -> Path:
    [folder] = Path(f"{recipe.product('teacher')}-snapshots").iterdir()
    return folder


def test_an_average_of_any_length_is_a_model(ldm, trained):
    product, root = trained.product("teacher"), str(snapshots(trained))
    assert not Path(trained.root, "checkpoints").exists() or not any(
        Path(trained.root, "checkpoints").iterdir()
    )  # snapshots are what outlives the run
    found = {}
    for length in (0.05, 0.07):
        result = ldm("export", product, f"out-{length}", "--average", length)
        assert result.exit_code == 0, result.output
        told, written, following = result.stdout.splitlines()
        assert told.startswith(f"average {length} at step {STEPS} out of 12 snapshots (power-0.05,")
        found[length], digest = load_model(f"out-{length}")[1:]
        assert digest in written
        assert following.startswith(f"next: ldm sample --model out-{length} ")
        config = load_model(f"out-{length}")[0]
        assert config.lineage["average"] == f"{length:g}"
        assert config.lineage["averaged_from"] == load_model(product)[2]
    last = newest(root)
    assert last is not None
    kept = read_tensors(last, "average/power-0.05/")
    for name, weight in average_of_length(root, 0.07).items():
        torch.testing.assert_close(found[0.05].state_dict()[name], kept[name])
        assert torch.equal(found[0.07].state_dict()[name], weight)
    assert "averaged over a relative length of 0.07" in Path("out-0.07/README.md").read_text()


def test_the_snapshots_of_a_copy_and_of_a_moved_project(ldm, trained, tmp_path):
    """What is beside the model counts first, so that a folder can be moved as a whole."""
    product = Path(trained.product("teacher"))
    moved = tmp_path / "elsewhere" / "renamed"
    moved.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (moved / file).write_bytes((product / file).read_bytes())
    assert ldm("export", moved, "from-copy", "--average", 0.07).exit_code == 0
    config = json.loads((moved / "config.json").read_text())
    config["lineage"]["snapshots"] = f"/gone/{snapshots(trained).name}"
    write_json(str(moved / "config.json"), config)
    assert_mistake(
        ldm("export", moved, "out", "--average", 0.07),
        "are gone", f"{moved}-snapshots/", "/gone/", "train.ema_lengths",
    )  # fmt: skip
    Path(f"{moved}-snapshots").symlink_to(snapshots(trained).parent)
    assert ldm("export", moved, "beside", "--average", 0.07).exit_code == 0
    one, other = (load_model(name)[1].state_dict() for name in ("from-copy", "beside"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_snapshots_of_another_network_are_refused(ldm, trained, tmp_path):
    model = tiny_project(tmp_path / "project")
    config = json.loads(Path(model, "config.json").read_text())
    config["lineage"]["snapshots"] = str(snapshots(trained))
    write_json(f"{model}/config.json", config)
    result = ldm("export", model, "out", "--average", 0.07)
    assert_mistake(result, "of another network than", "together")
