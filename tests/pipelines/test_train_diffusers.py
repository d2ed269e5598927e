"""`train.backbone=diffusers`: a transformer of diffusers is trained as it is, and stays one."""

import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import tiny_diffusers as tiny
import torch
from bucket_store import bucket_store
from command_line import assert_mistake
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from small_store import small_store
from tiny_project import tiny_project
from tiny_runs import train_here

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork, load_diffusers
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError
from ldm_core.model_directory import load_model
from ldm_core.training.adapter_weights import load_adapters
from ldm_core.training.checkpoint_newest import newest
from pipelines import distill_student
from pipelines import train_denoiser as module
from pipelines.denoiser_worker import DenoiserTraining
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options
from pipelines.teacher_places import ADAPTER
from pipelines.train_denoiser import train_denoiser

ADAMW = "train.optimizer=adamw"
TEXT = 5  # of small_store's tokens
TABLE = {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03}


def wan(folder, **config) -> str:
    shape = {"text_dim": TEXT, "in_channels": 3, "out_channels": 3}
    tiny.wan(**{**shape, **config}).save_pretrained(folder)
    return str(folder)


def pixart(folder, **config) -> str:
    shape = {"caption_channels": TEXT, "in_channels": 3, "out_channels": 6}
    tiny.pixart(**{**shape, **config}).save_pretrained(folder)
    beside = Path(folder).parent / "scheduler"
    beside.mkdir(exist_ok=True)
    (beside / "scheduler_config.json").write_text(json.dumps(TABLE))
    return str(folder)


def words_for(root: Path, initial: str, *words: str) -> tuple[str, ...]:
    return (
        f"tracking_uri=sqlite:///{root.parent}/mlflow.db",
        "size=8", "precision=fp32", "autoencoder.source=identity",
        "train.workers.count=1", "train.steps=3", "train.batch_size=4", "train.checkpoint_every=2",
        "train.log_every=1", "train.sample_every=3", "train.sample_steps=2",
        "train.learning_rate=0.01", "train.warmup_steps=0", "train.micro_batches=2",
        "train.backbone=diffusers", f"train.initial={initial}", *words,
    )  # fmt: skip


def recipe_at(root: Path, initial: str, *words: str) -> Recipe:
    overrides = words_for(root, initial, *words)
    return Arguments("image-tiny", root=str(root), overrides=overrides).resolve()


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


@pytest.fixture
def dry(ldm, tmp_path):
    """`ldm train --dry-run` of a store of pictures, or without one."""

    def run(initial, *words, store=(3, 8, 8)):
        root = tmp_path / "run"
        if store and not root.exists():
            small_store(root / "latents", shape=store)
        words = words_for(root, initial, *words)
        sets = [part for word in words for part in ("--set", word)]
        return ldm("train", "image-tiny", "--root", root, "--dry-run", *sets)

    return run


def test_a_dry_run_tells_what_the_module_is(dry, tmp_path):
    initial = wan(tmp_path / "theirs" / "transformer", num_layers=3)
    network = load_diffusers(initial).model
    total = sum(weight.numel() for weight in network.parameters())
    blocks = sum(weight.numel() for weight in network.blocks.parameters())
    text = " ".join(dry(initial, "train.accelerator=A100-40").stdout.split())
    assert (
        f"{total / 1e6:,.2f} M of a WanTransformer3DModel of diffusers: "
        f"3 blocks {blocks / 1e6:,.2f} M, the rest"
    ) in text
    assert "8x8x1 16 128" in text  # tokens of a picture by the model's own patches, and of text
    assert text.endswith("train: would run")


def test_what_no_network_here_computes_is_planned_as_it_is(dry, tmp_path):
    """Flux distilled with guidance."""
    shape = {"in_channels": 12, "joint_attention_dim": TEXT, "pooled_projection_dim": 3}
    tiny.flux(**shape, guidance_embeds=True).save_pretrained(tmp_path / "theirs")
    result = dry(tmp_path / "theirs")
    assert result.exit_code == 0, result.output


def test_without_a_store_too(dry, tmp_path):
    tiny.wan(text_dim=16, in_channels=3, out_channels=3).save_pretrained(tmp_path / "theirs")
    result = dry(tmp_path / "theirs", store=None)
    assert result.exit_code == 0, result.output
    assert "of a WanTransformer3DModel of diffusers" in " ".join(result.stdout.split())


def test_shapes_that_the_recipe_tells_mean_nothing(tmp_path):
    initial = wan(tmp_path / "transformer")
    plain, other = (
        recipe_at(tmp_path, initial, *words).train.deciding()
        for words in ((), ("train.width=64", "train.single_depth=3", "train.patch_size=4"))
    )
    assert plain == other
    assert plain != recipe_at(tmp_path, initial, "train.optimizer=adamw").train.deciding()


@pytest.mark.parametrize(
    ("make", "changes", "words", "named"),
    [
        (wan, {}, ["train.initial=null"], ["backbone diffusers without initial", "set initial"]),
        (wan, {}, ["train.layout={context: 2}", "train.workers.count=2"],
         ["layout.context 2 with backbone diffusers", "set layout.context=1"]),
        (wan, {"in_channels": 4, "out_channels": 4}, [],
         ["of latents of 4 channels, the store's have 3"]),
        (wan, {"text_dim": 12}, [], ["of captions of width 12, the store's tokens have 5"]),
        (wan, {"rope_max_seq_len": 2}, [], ["at most (2, 2, 2) tokens", "(1, 4, 4)"]),
        (wan, {"patch_size": (2, 2, 2)}, [], ["patches of (2, 2, 2)"]),
        (wan, {"patch_size": (1, 3, 3)}, [], ["patches of 3, which latents of 8 x 8"]),
        (tiny.lumina2, {"in_channels": 3, "cap_feat_dim": 5}, [],
         ["at most 31 tokens of caption", "up to 128", "text.max_tokens=31"]),
        (tiny.hunyuan_video, {"in_channels": 3, "out_channels": 3, "text_embed_dim": 5}, [],
         ["of pooled captions of width 6, the store's have 3"]),
        (tiny.unet, {}, [], ["is a UNet2DConditionModel; of diffusers' classes"]),
        (tiny.dit, {}, [], ["is a DiTTransformer2DModel", "takes labels"]),
        (tiny.sd3, {}, [], ["is a SD3Transformer2DModel", "train.backbone=mmdit"]),
        (tiny.flux, {"in_channels": 12, "guidance_embeds": True}, ["train.backbone=mmdit"],
         ["guidance_embeds True", "train.backbone=diffusers"]),
        (wan, {}, ["train.backbone=dit"],
         ["is a WanTransformer3DModel", "train.backbone=diffusers"]),
        (wan, {}, ["train.backbone=mmdit"],
         ["is a WanTransformer3DModel", "train.backbone=diffusers"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(dry, tmp_path, make, changes, words, named):
    folder = tmp_path / "theirs" / "transformer"
    made = make(folder, **changes) if make is wan else make(**changes)
    if not isinstance(made, str):
        made.save_pretrained(folder)
    assert_mistake(dry(folder, *words), "train", *named)


def test_videos_are_refused_by_a_model_of_pictures(dry, tmp_path):
    shapes = {"8x8x5": (3, 2, 8, 8)}
    bucket_store(tmp_path / "run" / "latents", {"8x8x5": 4}, shapes=shapes, statistics=None)
    folder = pixart(tmp_path / "theirs" / "transformer")
    result = dry(folder, "train.buckets=[8x8x5]", store=None)
    assert_mistake(result, "PixArtTransformer2DModel of pictures", "latents of 2 frames")


def test_our_own_models_are_trained_under_their_own_name(dry, tmp_path):
    uri = tiny_project(tmp_path / "project")
    assert_mistake(dry(uri), "is a DiT and no transformer of diffusers", "train.backbone=dit")


def test_a_trained_one_is_no_dit_and_no_teacher_of_students(trained, dry, monkeypatch):
    _, recipe, _ = trained["wan"]
    said = "where the recipe says DiT", "train.backbone=diffusers"
    assert_mistake(dry(recipe.product("teacher"), "train.backbone=dit"), *said)
    monkeypatch.setattr(distill_student, "run_stage", pytest.fail)
    with pytest.raises(UserError, match=r"WanTransformer3DModel of diffusers.*backbone is dit"):
        distill_student.distill_student(recipe, Options())


def test_another_scheduler_is_another_training(tmp_path):
    small_store(tmp_path / "latents", shape=(3, 8, 8))
    recipe = recipe_at(tmp_path, pixart(tmp_path / "theirs" / "transformer"))
    backbones = []
    for table in (TABLE, TABLE | {"prediction_type": "v_prediction"}):
        place = tmp_path / "theirs" / "scheduler" / "scheduler_config.json"
        place.write_text(json.dumps(table))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "run_stage", lambda *args: backbones.append(args[3]["backbone"]))
            train_denoiser(recipe, Options())
    first, second = backbones
    assert first["transformer"] == second["transformer"]
    assert first["scheduler"] != second["scheduler"]
