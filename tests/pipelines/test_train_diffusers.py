"""`train.backbone=diffusers`: a transformer of diffusers is trained as it is, and stays one."""

import math
import shutil

import peft
import pytest
import torch
from bucket_store import bucket_store
from command_line import assert_mistake
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from diffusers_recipes import ADAMW, TABLE, TEXT, dry_run, pixart, recipe_at, wan
from small_store import small_store
from tiny_runs import train_here

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork, load_diffusers
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError
from ldm_core.model_directory import load_model
from ldm_core.training.adapter_weights import load_adapters
from ldm_core.training.checkpoint_newest import newest
from pipelines import distill_student
from pipelines.denoiser_worker import DenoiserTraining
from pipelines.stage import Options
from pipelines.teacher_places import ADAPTER
from pipelines.train_denoiser import train_denoiser


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Tiny ones, trained on pictures: (folder, recipe, what was seen) of each."""
    return {
        "wan": run(tmp_path_factory.mktemp("wan"), wan, "train.validation_samples=4"),
        "pixart": run(tmp_path_factory.mktemp("pixart"), pixart, ADAMW),
    }


def run(root, make, *words):
    """Train on pictures; what is seen are the losses, and the weights before the first step."""
    small_store(root / "latents", shape=(3, 8, 8))
    initial = make(root / "theirs" / "transformer")
    recipe, seen = recipe_at(root, initial, *words), {"losses": []}
    step = DenoiserTraining.step

    def watched(self, number, samples):
        if number == 0:
            state = self.network.state_dict()
            seen["first"] = {name: weight.clone() for name, weight in state.items()}
        result = step(self, number, samples)
        seen["losses"].append(result.loss)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoiserTraining, "step", watched)
        seen["summary"] = train_here(train_denoiser, recipe).summary
    return initial, recipe, seen


NAMES = pytest.mark.parametrize("name", ["wan", "pixart"])


@NAMES
def test_it_begins_with_the_weights_of_the_folder_and_moves_them(trained, name):
    initial, recipe, seen = trained[name]
    before = load_diffusers(initial).model.state_dict()
    assert before.keys() == seen["first"].keys()
    assert all(torch.equal(before[name], weight) for name, weight in seen["first"].items())
    assert len(seen["losses"]) == 3
    assert torch.tensor(seen["losses"]).isfinite().all()
    assert seen["summary"]["parameters"] == sum(weight.numel() for weight in before.values())
    assert ("final_validation_loss" in seen["summary"]) == bool(recipe.train.validation_samples)
    assert math.isfinite(seen["summary"].get("final_validation_loss", 0.0))
    after = load_model(recipe.product("teacher"))[1].state_dict()
    moved = [name for name in before if (after[name] - before[name]).abs().max() > 1e-6]
    assert len(moved) > len(before) / 2
    assert all(weight.isfinite().all() for weight in after.values())


def test_a_killed_training_goes_on_to_the_same_bits(trained, tmp_path, monkeypatch):
    small_store(tmp_path / "latents", shape=(3, 8, 8))
    initial, before, _ = trained["pixart"]
    recipe, look = recipe_at(tmp_path, initial, ADAMW), DenoiserTraining.look

    def killed(self: DenoiserTraining, done: int) -> None:
        if done == 3:
            self.resuming.wait()
            raise RuntimeError("killed")
        look(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(DenoiserTraining, "look", killed)
        with pytest.raises(Exception, match="killed"):
            train_here(train_denoiser, recipe)
    [folder] = (tmp_path / "checkpoints").iterdir()
    kept = newest(str(folder))
    assert kept is not None
    assert kept.step == 2
    again = train_here(train_denoiser, recipe)
    assert again.summary["digest"] == load_model(before.product("teacher"))[2]


def state(name):
    generator = torch.Generator().manual_seed(5)
    x, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([0.3, 0.8])
    tokens = torch.randn(2, 4, TEXT, generator=generator)
    return x, t, TextCondition(tokens, torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 3))


@torch.no_grad()
@NAMES
def test_export_is_a_model_that_diffusers_loads_and_that_draws_the_same(trained, name, ldm):
    """diffusers' module is called as it is published to be called: Wan's with 1000 t, PixArt's with
    the row of its table that has the flow's ratio of signal to noise."""
    _, recipe, _ = trained[name]
    _, network, _ = load_model(recipe.product("teacher"))
    result = ldm("export", recipe.product("teacher"), "out")
    assert result.exit_code == 0, result.output
    kind = {"wan": WanTransformer3DModel, "pixart": PixArtTransformer2DModel}[name]
    model = load_by_diffusers(kind, "out")
    for key, weight in network.state_dict().items():
        assert torch.equal(model.state_dict()[key], weight), key
    x, t, cond = state(name)
    again = load_diffusers("out")
    assert torch.equal(DiffusersFlow(network.config)._raw[0].process.alpha(t),
                       again.process.alpha(t))  # fmt: skip
    ours = network(x, t, cond)
    if name == "wan":
        tokens = torch.nn.functional.pad(cond.tokens, (0, 0, 0, 512 - 4))
        theirs = model(x[:, :, None], 1000 * t, tokens, return_dict=False)[0][:, :, 0]
    else:
        betas = torch.linspace(TABLE["beta_start"], TABLE["beta_end"], 1000, dtype=torch.float64)
        alpha = (1 - betas).cumprod(0).sqrt()
        ratio = alpha / (1 - alpha**2).sqrt()
        row = (ratio[:, None] - (1 - t) / t).abs().argmin(0)
        t = 1 / (1 + ratio[row]).float()  # the flow's times of these very rows
        a, s = alpha[row].float()[:, None, None, None], (1 - t)[:, None, None, None]
        ours, x_s = network(x, t, cond), x * a / s
        eps = model(x_s, cond.tokens, row, {"resolution": None, "aspect_ratio": None},
                    encoder_attention_mask=cond.mask, return_dict=False)[0][:, :3]  # fmt: skip
        theirs = eps - (x_s - (1 - a**2).sqrt() * eps) / a
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def load_by_diffusers(kind, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_keep_in_fp32_modules", None)
        return kind.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)


def test_adapters_alone_are_trained_on_clips_and_pictures(tmp_path, ldm):
    """And what comes of it is averaged anew, exported, and begun with again."""
    shapes = {"8x8x1": (3, 8, 8), "8x8x5": (3, 2, 8, 8)}
    bucket_store(tmp_path / "latents", {"8x8x5": 6, "8x8x1": 4}, shapes=shapes, statistics=None)
    initial = wan(tmp_path / "theirs" / "transformer")
    clips = ("train.buckets=[8x8x5]", "train.lora_rank=2", "train.ema_lengths=[0.1]",
             "train.activation_checkpointing=selective")  # fmt: skip
    recipe = recipe_at(tmp_path, initial, *clips)
    train_here(train_denoiser, recipe)
    before = load_diffusers(initial).model
    config, network, digest = load_model(recipe.product("teacher"))
    after, found = network.state_dict(), load_adapters(f"{recipe.product('teacher')}/{ADAPTER}")
    assert found is not None
    layers = {name.partition(".lora_")[0] for name in found.weights}
    for name, weight in before.state_dict().items():
        changed = name.removesuffix(".weight") in layers
        assert torch.equal(after[name], weight) != changed, name
    x, t = torch.randn(2, 3, 2, 8, 8), torch.tensor([0.3, 0.8])
    cond = state("wan")[2]
    adapted = peft.PeftModel.from_pretrained(before, f"{recipe.product('teacher')}/{ADAPTER}")
    merged = DiffusersNetwork(adapted.merge_and_unload())  # diffusers' own module, by peft
    torch.testing.assert_close(network(x, t, cond), merged(x, t, cond), rtol=0, atol=1e-4)

    for words in (("averaged", "--average", 0.1), ("theirs",)):  # and that in diffusers' layout
        result = ldm("export", recipe.product("teacher") if words[1:] else "averaged", *words)
        assert result.exit_code == 0, result.output
    averaged = load_by_diffusers(WanTransformer3DModel, "theirs").state_dict()
    assert all(
        torch.equal(averaged[name], w) for name, w in load_model("averaged")[1].state_dict().items()
    )
    assert any(not torch.equal(averaged[name], weight) for name, weight in after.items())

    again = shutil.copytree(recipe.product("teacher"), tmp_path / "first")
    second = recipe_at(tmp_path, str(again), "train.buckets=[8x8x5]", "train.steps=1")
    with pytest.MonkeyPatch.context() as patch:
        seen = {}
        patch.setattr(DenoiserTraining, "step", lambda self, *_: keep(self, seen))
        with pytest.raises(Exception, match="seen"):
            train_here(train_denoiser, second)
    assert seen["backbone"] == config.backbone
    assert all(torch.equal(seen["state"][name], weight) for name, weight in after.items())
    assert seen["initial"] == digest


def keep(training, seen):
    seen |= {"state": training.network.state_dict(), "backbone": training.config,
             "initial": training.job.inputs["initial"]}  # fmt: skip
    raise RuntimeError("seen")


def test_a_trained_one_is_no_dit_and_no_teacher_of_students(trained, ldm, tmp_path, monkeypatch):
    _, recipe, _ = trained["wan"]
    said = "where the recipe says DiT", "train.backbone=diffusers"
    result = dry_run(ldm, tmp_path / "run", recipe.product("teacher"), "train.backbone=dit")
    assert_mistake(result, *said)
    monkeypatch.setattr(distill_student, "run_stage", pytest.fail)
    with pytest.raises(UserError, match=r"WanTransformer3DModel of diffusers.*backbone is dit"):
        distill_student.distill_student(recipe, Options())
