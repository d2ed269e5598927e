"""`train.backbone=diffusers` before training: what is told, what is refused, what decides it."""

import json
from functools import partial

import pytest
import tiny_diffusers as tiny
from bucket_store import bucket_store
from command_line import assert_mistake
from diffusers_recipes import TABLE, TEXT, dry_run, pixart, recipe_at, wan
from small_store import small_store
from tiny_project import tiny_project

from ldm_core.backbones.diffusers_adapter import load_diffusers
from pipelines import train_denoiser as module
from pipelines.stage import Options
from pipelines.train_denoiser import train_denoiser


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def dry(ldm, tmp_path):
    return partial(dry_run, ldm, tmp_path / "run")


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
