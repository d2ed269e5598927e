"""Adapters on the tiny DiT: the formula, what trains, and the way through a checkpoint."""

import copy

import pytest
import torch
from small_dit import B, batch, trained_dit

from ldm_core.backbones.dit import DiT
from ldm_core.errors import UserError
from ldm_core.training.checkpoint_state import TrainingState, architecture_of
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints
from ldm_core.training.ema import Ema
from ldm_core.training.lora import adapters, add_lora, merge_lora

RANK, ALPHA = 3, 6
LAYER = "blocks.1.attention.qkv"


def adapted() -> DiT:
    network = trained_dit()
    torch.manual_seed(5)
    add_lora(network, RANK, ALPHA)
    return network


def trained(network: DiT, average: Ema | None = None) -> DiT:
    x_t, t, cond = batch()
    optimizer = torch.optim.AdamW(adapters(network), 0.05)
    for _ in range(3):
        network(x_t, t, cond).square().sum().div(B).backward()
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update(network)
    return network


@torch.no_grad()
def test_it_begins_as_the_network_was():
    x_t, t, cond = batch()
    assert torch.equal(adapted()(x_t, t, cond), trained_dit()(x_t, t, cond))


def test_only_adapters_train():
    network = adapted()
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert {name.split(".lora_")[0] for name in names} == {
        f"{part}.{i}.attention.{layer}"
        for part, depth in (("blocks", 3), ("text_blocks", 2))
        for i in range(depth)
        for layer in ("qkv", "out")
    }
    before = copy.deepcopy(network.state_dict())
    trained(network)
    moved = {name for name, w in network.state_dict().items() if not torch.equal(before[name], w)}
    assert moved == names


@torch.no_grad()
def test_merged_is_the_base_and_the_scaled_product():
    with torch.enable_grad():
        network = trained(adapted())
    x_t, t, cond = batch()
    predicted, state = network(x_t, t, cond), copy.deepcopy(network.state_dict())
    merge_lora(network)
    base = trained_dit().state_dict()
    assert network.state_dict().keys() == base.keys()
    a, b = (state[f"{LAYER}.lora_{part}.default.weight"] for part in "AB")
    expected = base[f"{LAYER}.weight"] + ALPHA / RANK * b @ a
    torch.testing.assert_close(network.state_dict()[f"{LAYER}.weight"], expected)
    assert not torch.equal(expected, base[f"{LAYER}.weight"])
    torch.testing.assert_close(network(x_t, t, cond), predicted)


def test_out_of_a_checkpoint_and_merged(tmp_path):
    network = adapted()
    average = Ema(network, 0.5)
    trained(network, average)
    state = TrainingState(network, (), {"ema": average})
    made = Checkpoints(str(tmp_path), architecture_of(network))
    made.save(3, state.tensors(), state.facts())
    made.wait()
    again = adapted()
    again.load_state_dict(read_tensors(made.newest(), "average/ema/"))
    merge_lora(again)
    network.load_state_dict(average.state_dict())
    merge_lora(network)
    for name, weight in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_a_checkpoint_of_the_adapters_alone(tmp_path):
    network = adapted()
    average = Ema(network, 0.5)
    trained(network, average)
    state = TrainingState(network, (), {"ema": average}, trained_only=True)
    assert {name.split("/")[0] for name in state.tensors()} == {"model", "average"}
    assert all("lora_" in name for name in state.tensors())
    made = Checkpoints(str(tmp_path), architecture_of(network) | {"lora": [RANK, ALPHA]})
    made.save(3, state.tensors(), state.facts())
    made.wait()
    again = adapted()
    other = TrainingState(again, (), {"ema": Ema(again, 0.5)}, trained_only=True)
    other.load(made.newest())
    for mine, theirs in ((again, network), (other.averages["ema"], average)):
        for name, weight in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[name], weight)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"no layer of DiT has a name that ends in nothing\.here"):
        add_lora(trained_dit(), 2, 2, ["nothing.here"])
