"""What a training may start from: a model or a diffusers transformer that fits the recipe."""

import json
from contextlib import nullcontext

import pytest
from command_line import assert_mistake
from small_store import small_store
from tiny_plans import WORDS, tiny
from tiny_project import model_config, random_network, tiny_project

from ldm_core.errors import UserError
from ldm_core.model_directory import Reference, save_model
from pipelines.backbones import stored_space
from pipelines.train_initial import check_initial
from pipelines.train_plan import plan_training


def initial_model(root, version, **changes) -> str:
    """A model directory that goes with the store."""
    tiny_project(root)
    texts = {
        entry.name: Reference(uri=entry.uri, digest=entry.digest)
        for entry in version.manifest.texts
    }
    entry = version.manifest.autoencoder
    config = model_config(texts, autoencoder=Reference(uri=entry.uri, digest=entry.digest))
    backbone = plan_training(tiny(), stored_space(version)).backbone
    config = config.model_copy(update={"backbone": backbone, **changes})
    save_model(f"{root}/initial", config, random_network(config.backbone).state_dict(), "")
    return f"{root}/initial"


def test_a_model_to_start_from(ldm, tmp_path):
    version = small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    at = initial_model(tmp_path / "p", version)
    good = (*WORDS, "--set", f"train.initial={at}", "--dry-run")
    assert ldm("train", *good).stdout.endswith("train: would run\n")
    wider = ldm("train", *good, "--set", "train.width=64")
    assert_mistake(wider, "train.initial", "width 32 and not 64")
    kind = ldm("train", *good, "--set", "train.backbone=mmdit")
    assert_mistake(kind, "is a DiT where the recipe says MMDiT")
    other = Reference(uri="identity", digest="0123")
    at = initial_model(tmp_path / "q", version, autoencoder=other)
    result = ldm("train", *WORDS, "--set", f"train.initial={at}", "--dry-run")
    assert_mistake(result, "trained with autoencoder 0123", "the store's is identity")
    gone = ldm("train", *WORDS, "--set", "train.initial=nowhere", "--dry-run")
    assert_mistake(gone, "no model at", "nowhere")


def test_a_diffusers_transformer_of_other_channels(ldm, tmp_path):
    small_store(tmp_path / "run" / "latents", shape=(2, 8, 8))
    (tmp_path / "sd3").mkdir()
    config = {"_class_name": "SD3Transformer2DModel", "in_channels": 16}
    (tmp_path / "sd3" / "config.json").write_text(json.dumps(config))
    result = ldm("train", *WORDS, "--set", "train.initial=sd3", "--dry-run")
    assert_mistake(result, "latents of 16 channels", "have 2")


SD3 = {
    "_class_name": "SD3Transformer2DModel", "in_channels": 2, "patch_size": 2, "num_layers": 2,
    "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 5,
    "pooled_projection_dim": 3, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 8, "num_layers": 2,
    "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": 5, "pooled_projection_dim": 3, "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (SD3, None),
        (SD3 | {"num_layers": 3}, "depth 3 and not 2"),
        (SD3 | {"attention_head_dim": 32}, "width 64 and not 32"),
        (SD3 | {"qk_norm": None}, "qk_norm False and not True"),
        (SD3 | {"joint_attention_dim": 7}, "text_width 7 and not 5"),
        (SD3 | {"dual_attention_layers": [0]}, "dual_attention_layers"),
        (FLUX, "single_depth 1 and not 0"),
        (FLUX | {"guidance_embeds": True}, "guidance_embeds True"),
        ({"_class_name": "DiTTransformer2DModel", "in_channels": 2}, "begins with one of SD3"),
    ],
)
def test_a_diffusers_transformer_of_another_architecture(tmp_path, written, named):
    version = small_store(tmp_path / "latents", shape=(2, 8, 8))
    (tmp_path / "config.json").write_text(json.dumps(written))
    words = ("backbone=mmdit", "positions=fixed", "width=32", "depth=2", "heads=2")
    backbone = plan_training(tiny(*(f"train.{w}" for w in words)), stored_space(version)).backbone
    with nullcontext() if named is None else pytest.raises(UserError, match=named):
        check_initial(str(tmp_path), version.manifest, backbone)
    if named is None:
        flux = plan_training(
            tiny(*(f"train.{w}" for w in (words[0], *words[2:], "single_depth=1"))),
            stored_space(version),
        ).backbone
        (tmp_path / "config.json").write_text(json.dumps(FLUX))
        check_initial(str(tmp_path), version.manifest, flux)
        (tmp_path / "config.json").write_text(json.dumps(SD3 | {"num_layers": 2}))
        with pytest.raises(UserError, match="single_depth 0 and not 1"):
            check_initial(str(tmp_path), version.manifest, flux)
        dit = plan_training(tiny(), stored_space(version)).backbone
        with pytest.raises(UserError, match="is a MMDiT where the recipe says DiT"):
            check_initial(str(tmp_path), version.manifest, dit)
