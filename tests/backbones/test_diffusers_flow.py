"""A transformer of diffusers as training takes it: the flow's velocity, names, blocks, tables."""

import copy
import json

import pytest
import tiny_diffusers as tiny
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm_core.backbones.build import new_backbone, without_weights
from ldm_core.backbones.diffusers_adapter import DiffusersNetwork
from ldm_core.backbones.diffusers_config import DiffusersConfig, Facts, read_diffusers_config
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, half_log_snr
from ldm_core.diffusion.variance_preserving import DiscreteVP, scaled_linear_betas
from ldm_core.errors import UserError
from ldm_core.planning.forward_pass import measure_forward
from ldm_core.planning.weights import blocks_of, weights_of
from ldm_core.training.lora import add_lora, attention_layers, merge_lora
from ldm_core.training.optimizers import hidden_matrices
from ldm_core.training.recomputation import recompute_all, recompute_cheap
from ldm_core.training.shards import give_memory
from pipelines.backbones import lists_of_blocks

FLOWS = ["wan", "hunyuan_video", "ltx", "lumina2", "flux"]
NAMES = [*FLOWS, "pixart"]
EVERY = pytest.mark.parametrize("name", NAMES)
T = torch.tensor([0.3, 0.8])
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def models():
    """name -> (diffusers' module, the network here with the same weights)."""
    return {name: both(name) for name in NAMES}


def both(name, **config):
    model = tiny.FAMILIES[name](**config)
    content = {"_class_name": type(model).__name__, **model.config}
    scheduler = TABLE if name == "pixart" else {}
    network = DiffusersFlow(DiffusersConfig(transformer=content, scheduler=scheduler))
    network.load_state_dict(model.state_dict())
    return model, network


@torch.no_grad()
@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)])
def test_a_flow_is_what_it_was(models, name, lengths):
    model, network = models[name]
    x, cond = tiny.latents(name), tiny.captions(lengths)
    assert torch.equal(network(x, T, cond), DiffusersNetwork(model)(x, T, cond))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_model_of_a_table_is_asked_at_the_same_ratio(models, kind):
    model, network = models["pixart"]
    scheduler = {**TABLE, "prediction_type": kind}
    network = DiffusersFlow(network.config.model_copy(update={"scheduler": scheduler}))
    network.load_state_dict(model.state_dict())
    x, cond, process = tiny.latents("pixart"), tiny.captions(), DiscreteVP(scaled_linear_betas())
    s = process.time_of(half_log_snr(FlowProcess(), T))
    factor = process.alpha(s) / (1 - T)
    raw = DiffusersNetwork(model, scheduler)
    x_s = factor[:, None, None, None] * x
    value = raw(x_s, s, cond)
    prediction = Prediction.EPS if kind == "epsilon" else Prediction.V
    x0, eps = (
        convert(value, x_s, s, process, prediction, each)
        for each in (Prediction.X0, Prediction.EPS)
    )
    torch.testing.assert_close(network(x, T, cond), eps - x0)


@torch.no_grad()
def test_a_picture_is_a_video_of_one_frame_and_the_other_way_round(models):
    for name, one_frame in (("wan", False), ("pixart", True)):
        network, x = models[name][1], torch.randn(2, 4, 8, 8)
        video = network(x[:, :, None], T, tiny.captions())
        assert video.shape == (2, 4, 1, 8, 8), one_frame
        assert torch.equal(video[:, :, 0], network(x, T, tiny.captions()))
    with pytest.raises(UserError, match="3 frames for a PixArtTransformer2DModel"):
        models["pixart"][1](torch.randn(2, 4, 3, 8, 8), T, tiny.captions())


@EVERY
def test_its_parts_are_the_models_under_the_same_names(models, name):
    model, network = models[name]
    assert list(network.state_dict()) == list(model.state_dict())
    mine, theirs = dict(network.named_parameters()), dict(network.model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in mine)
    other = copy.deepcopy(network)
    next(iter(other.parameters())).data += 1
    assert not torch.equal(next(iter(other.parameters())), next(iter(network.parameters())))
    assert next(iter(other.parameters())) is next(iter(other.model.parameters()))


@EVERY
def test_blocks_and_hidden_matrices_are_found(models, name):
    """All blocks of whatever list, and none of their modulation, which is a table or of a norm."""
    network = models[name][1]
    blocks = [block for blocks in lists_of_blocks(network) for block in blocks]
    assert [id(block) for block in blocks] == [id(block) for _, block in blocks_of(network)]
    counts = {
        "wan": 1, "hunyuan_video": 3, "ltx": 1, "lumina2": 3, "flux": 2, "pixart": 1
    }  # fmt: skip
    assert len(blocks) == counts[name]
    hidden = {id(weight) for weight in hidden_matrices(*lists_of_blocks(network))}
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    assert hidden <= inside
    linear = {
        id(layer.weight)
        for block in blocks
        for key, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and "norm" not in key
    }
    assert hidden == linear


@EVERY
def test_it_is_planned_without_memory(models, name):
    model, network = models[name]
    with torch.device("meta"):
        planned = new_backbone(network.config)
        cond = TextCondition(
            torch.empty(1, 5, tiny.TEXT), torch.ones(1, 5, dtype=bool), torch.empty(1, tiny.POOLED)
        )
        x, t = torch.empty(1, *tiny.latents(name).shape[1:]), torch.empty(1)
    assert weights_of(planned).total == sum(weight.numel() for weight in model.parameters())
    counted = measure_forward(planned, x, t, cond).flops
    x, cond = tiny.latents(name)[:1], tiny.captions((5,))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():  # of products that are counted
        network(x, T[:1], cond)
    assert counted == counter.get_total_flops()


@torch.no_grad()
@EVERY
def test_without_weights_what_it_computes_itself_is_real(models, name):
    model, network = models[name]
    with without_weights():
        empty = new_backbone(network.config)
    assert all(weight.is_meta for weight in empty.parameters())
    give_memory(empty, torch.device("cpu"))
    empty.load_state_dict(model.state_dict())
    x, cond = tiny.latents(name), tiny.captions()
    assert torch.equal(empty(x, T, cond), network(x, T, cond))
    assert not any(weight.is_meta for weight in torch.nn.Linear(2, 2).parameters())


@EVERY
def test_adapters_are_on_its_attention(name):
    model, network = both(name)
    x, cond = tiny.latents(name), tiny.captions()
    expected = network(x, T, cond).detach()
    layers = attention_layers(network)
    assert {layer.rpartition(".")[2] for layer in layers} >= {"to_q", "to_k", "to_v"}
    assert all(isinstance(network.get_submodule(layer), torch.nn.Linear) for layer in layers)
    add_lora(network, 2, 2)
    torch.testing.assert_close(network(x, T, cond), expected)
    trained = [(key, w) for key, w in network.named_parameters() if w.requires_grad]
    assert {key.partition(".lora_")[0] for key, _ in trained} == set(layers)
    for _, weight in trained:
        weight.data += 0.1
    adapted = network(x, T, cond).detach()
    assert (adapted - expected).abs().max() > 1e-3
    merge_lora(network)
    assert list(network.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(network(x, T, cond), adapted, rtol=1e-4, atol=1e-4)


@EVERY
def test_every_weight_has_a_gradient_and_recomputing_changes_none(models, name):
    """A weight without one would stop copies that exchange gradients."""
    x, cond, found = tiny.latents(name), tiny.captions((5, 2)), []
    for recompute in (None, recompute_all, recompute_cheap):
        network = copy.deepcopy(models[name][1])
        for block in (block for blocks in lists_of_blocks(network) for block in blocks):
            if recompute:
                recompute(block)
        network(x, T, cond).square().mean().backward()
        found.append([weight.grad for weight in network.parameters()])
    assert all(gradient is not None for gradient in found[0])
    assert max(gradient.abs().max() for gradient in found[0]) > 1e-3
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))


FACTS = {
    "wan": Facts(4, (1, 2, 2), 12, 0, True, 512, (32, 32, 32)),
    "hunyuan_video": Facts(4, (1, 2, 2), 12, 6, True),
    "ltx": Facts(4, (1, 1, 1), 12, 0, True),
    "lumina2": Facts(4, (1, 2, 2), 12, 0, False, 31, (1, 16, 16)),
    "flux": Facts(4, (1, 2, 2), 12, 6),
    "pixart": Facts(4, (1, 2, 2), 12),
}


@EVERY
def test_a_folder_says_what_it_is(models, name, tmp_path):
    model, network = models[name]
    model.save_pretrained(tmp_path / "transformer")
    if name == "pixart":
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(TABLE))
    config = read_diffusers_config(str(tmp_path / "transformer"))
    assert config.facts == FACTS[name]
    assert DiffusersConfig.model_validate_json(config.model_dump_json()) == config
    assert config.scheduler == network.config.scheduler
    written = json.loads((tmp_path / "transformer" / "config.json").read_text())
    for key in {"attention_bias", "eps", "norm_eps", "theta", "mlp_ratio"} & written.keys():
        del written[key]  # as an older version of diffusers left it out
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(written))
    assert read_diffusers_config(str(tmp_path / "transformer")) == config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel; of diffusers'"),
        ({"_class_name": "SD3Transformer2DModel"}, "train.backbone=mmdit"),
        ({"_class_name": "DiTTransformer2DModel"}, "takes labels"),
        ({"_class_name": "WanTransformer3DModel", "image_dim": 1280}, "has image_dim 1280"),
    ],
)
def test_what_is_not_trained_is_refused(tmp_path, content, said):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_diffusers_config(str(tmp_path))
    if "image_dim" not in content:
        with pytest.raises(ValidationError, match=content["_class_name"]):
            DiffusersConfig(transformer=content)


def test_a_configuration_with_holes_is_refused_by_what_is_missing():
    config = DiffusersConfig(transformer={"_class_name": "PixArtTransformer2DModel"})
    with pytest.raises(UserError, match="PixArtTransformer2DModel does not say 'patch_size'"):
        _ = config.in_channels


def test_dropout_is_off(tmp_path):
    network = both("pixart", dropout=0.5)[1].train()
    x, cond = tiny.latents("pixart"), tiny.captions()
    assert torch.equal(network(x, T, cond), network(x, T, cond))
