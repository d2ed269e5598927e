"""From checkpoints to models, and from models to the beginning of a run."""

from pathlib import Path

import pytest
import tiny_diffusers as tiny
import torch
from tiny_project import backbone, model_config, random_network
from torch import nn

from ldm_core.backbones.class_dit import ClassDiT, ClassDiTConfig
from ldm_core.backbones.diffusers_adapter import load_diffusers
from ldm_core.backbones.dit import DiT
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.model_directory import Reference, load_model
from ldm_core.model_export import (
    export_diffusers,
    export_model,
    initial_weights,
    trained_weights,
)
from ldm_core.training.checkpoint_folder import Checkpoint
from ldm_core.training.checkpoint_state import TrainingState, architecture_of
from ldm_core.training.checkpoints import Checkpoints
from ldm_core.training.ema import Ema

TEXTS = {name: Reference(uri=f"/far/away/{name}", digest=f"of {name}") for name in ("t5", "clip")}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def checkpoint_of(network: nn.Module, average: Ema, root: Path) -> Checkpoint:
    state = TrainingState(network, (), {"ema": average})
    made = Checkpoints(str(root), architecture_of(network))
    made.save(1, state.tensors(), state.facts())
    made.wait()
    return made.newest()


def trained(network: nn.Module) -> Ema:
    average = Ema(network, 0.5)
    tiny.shaken(network, seed=7)
    average.update(network)
    return average


@pytest.fixture
def dit() -> DiT:
    return random_network(backbone())


def test_masters_and_averages_as_model_directories(dit, tmp_path):
    average = trained(dit)
    found = checkpoint_of(dit, average, tmp_path / "run")
    for name, weights in ((None, dit.state_dict()), ("ema", average.state_dict())):
        uri = str(tmp_path / f"model-{name}")
        digest = export_model(found, uri, model_config(TEXTS), "# A card\n", name)
        config, network, read = load_model(uri)
        assert (config.backbone, read) == (dit.config, digest)
        assert same(network.state_dict(), weights)
    assert not same(trained_weights(found), trained_weights(found, "ema"))


def test_what_the_checkpoint_is_not_is_refused(dit, tmp_path):
    found = checkpoint_of(dit, trained(dit), tmp_path / "run")
    with pytest.raises(UserError, match="no average 'slow': choose one of ema"):
        trained_weights(found, "slow")
    wider = model_config(TEXTS).model_copy(
        update={"backbone": backbone().model_copy(update={"width": 32})}
    )
    with pytest.raises(UserError, match="width 16 there, 32 here"):
        export_model(found, str(tmp_path / "model"), wider, "")
    with pytest.raises(UserError, match="a DiT is no model of diffusers'"):
        export_diffusers(found, dit.config, str(tmp_path / "model"))


@pytest.mark.parametrize("changes", [{}, {"rotary": (2, 2, 4), "single_depth": 1}])
def test_a_checkpoint_as_a_diffusers_transformer_and_back(changes, tmp_path):
    config = MMDiTConfig(
        in_channels=4, patch_size=2, width=16, depth=2, heads=2, text_width=tiny.TEXT,
        pooled_width=tiny.POOLED, **changes,
    )  # fmt: skip
    network = tiny.shaken(MMDiT(config))
    average = trained(network)
    found = checkpoint_of(network, average, tmp_path / "run")
    uri = str(tmp_path / "transformer")
    export_diffusers(found, config, uri, "ema")
    initial = initial_weights(uri)
    assert initial.config == config
    assert same(initial.weights, average.state_dict())
    x, t, cond = tiny.latents("sd3"), torch.tensor([0.25, 0.9]), tiny.captions()
    fresh = MMDiT(config).eval()
    initial.load_into(fresh)
    with torch.no_grad():
        theirs = load_diffusers(uri)(x, t, cond)
        torch.testing.assert_close(fresh(x, t, cond), theirs, rtol=0, atol=1e-5)


def test_to_a_bucket(s3, tmp_path):
    network = tiny.shaken(MMDiT(MMDiTConfig(
        in_channels=4, patch_size=2, width=16, depth=1, heads=2, text_width=4, pooled_width=4
    )))  # fmt: skip
    found = checkpoint_of(network, trained(network), tmp_path / "run")
    export_diffusers(found, network.config, f"{s3}/exported/transformer")
    assert same(initial_weights(f"{s3}/exported/transformer").weights, network.state_dict())


def test_begin_with_a_model_directory_of_another_size(dit, tmp_path):
    found = checkpoint_of(dit, trained(dit), tmp_path / "run")
    export_model(found, str(tmp_path / "model"), model_config(TEXTS), "")
    initial = initial_weights(str(tmp_path / "model"))
    larger = DiT(backbone().model_copy(update={"latent_size": (16, 16)}))
    initial.load_into(larger)
    assert same(larger.state_dict(), dit.state_dict())
    wider = DiT(backbone().model_copy(update={"width": 32}))
    with pytest.raises(UserError, match=r"does not fit this run's network \(width 16 there, 32"):
        initial.load_into(wider)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_begin_with_published_weights(name, tmp_path):
    model = tiny.FAMILIES[name]()
    model.save_pretrained(tmp_path)
    initial = initial_weights(str(tmp_path))
    x, t, cond = tiny.latents(name), torch.tensor([0.25, 0.9]), tiny.condition(name)
    network = {ClassDiTConfig: ClassDiT, MMDiTConfig: MMDiT}[type(initial.config)](initial.config)
    network.eval()
    initial.load_into(network)
    with torch.no_grad():
        theirs = load_diffusers(str(tmp_path))(x, t, cond)
        torch.testing.assert_close(network(x, t, cond), theirs, rtol=0, atol=1e-5)


def test_what_is_no_network_here_is_refused(dit, tmp_path):
    for name, words in (("wan", "is a WanTransformer3DModel"), ("pixart", "train the model")):
        tiny.FAMILIES[name]().save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=words):
            initial_weights(str(tmp_path / name))
    tiny.flux(guidance_embeds=True).save_pretrained(tmp_path / "dev")
    with pytest.raises(UserError, match="embeds a guidance scale"):
        initial_weights(str(tmp_path / "dev"))
    tiny.sd3().save_pretrained(tmp_path / "sd3")
    with pytest.raises(UserError, match="is of a MMDiT, this run trains a DiT"):
        initial_weights(str(tmp_path / "sd3")).load_into(dit)
