"""`train.backbone=diffusers`: a transformer of diffusers is trained as it is, and stays one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_diffusers as tiny
import torch
from bucket_store import bucket_store
from command_line import assert_mistake
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from small_store import small_store
from tiny_runs import train_here

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork, load_diffusers
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.conditioning.text import TextCondition
from ldm_core.model_directory import load_model
from ldm_core.training.adapter_weights import load_adapters
from pipelines.denoiser_worker import DenoiserTraining
from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe
from pipelines.teacher_places import ADAPTER
from pipelines.train_denoiser import train_denoiser

TEXT = 5  # of small_store's tokens
TABLE = {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03}


def wan(folder, **config) -> str:
    tiny.wan(text_dim=TEXT, in_channels=3, out_channels=3, **config).save_pretrained(folder)
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
    """A tiny Wan and a tiny PixArt, trained on pictures: name -> (folder, recipe, what was seen)."""
    return {
        "wan": run(tmp_path_factory.mktemp("wan"), wan, "train.validation_samples=4"),
        "pixart": run(tmp_path_factory.mktemp("pixart"), pixart, "train.optimizer=adamw"),
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
        train_here(train_denoiser, recipe)
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
    after = load_model(recipe.product("teacher"))[1].state_dict()
    moved = [name for name in before if (after[name] - before[name]).abs().max() > 1e-6]
    assert len(moved) > len(before) / 2
    assert all(weight.isfinite().all() for weight in after.values())


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
