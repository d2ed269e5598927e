"""Adapters by name: taken apart, averaged alone, added and taken off, written and read."""

import copy

import torch
from small_dit import B, batch, trained_dit

from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.training.adapter_weights import (
    Adapters,
    AdaptersOf,
    apart,
    load_adapters,
    with_added,
)
from ldm_core.training.ema import Ema
from ldm_core.training.lora import adapters, add_lora, attention_layers, merge_lora

RANK, ALPHA = 3, 6


def moved() -> torch.nn.Module:
    """A network whose adapters have left zero."""
    network = trained_dit()
    torch.manual_seed(5)
    add_lora(network, RANK, ALPHA)
    for weight in adapters(network):
        weight.data += 0.1 * torch.randn_like(weight)
    return network


def test_apart_and_added_is_what_peft_merges():
    network = moved()
    base, factors = apart(copy.deepcopy(network.state_dict()))  # merging is in place
    plain = trained_dit().state_dict()
    assert base.keys() == plain.keys()
    assert all(torch.equal(base[name], weight) for name, weight in plain.items())
    merge_lora(network)
    added = with_added(base, factors, ALPHA / RANK)
    torch.testing.assert_close(added, dict(network.state_dict()), rtol=0, atol=1e-6)
    assert not torch.equal(added["blocks.0.attention.out.weight"],
                           base["blocks.0.attention.out.weight"])  # fmt: skip
    back = with_added(added, factors, -ALPHA / RANK)
    torch.testing.assert_close(back, base, rtol=0, atol=1e-6)


def test_the_average_of_adapters_alone_is_that_of_the_whole_network():
    network = moved()
    own, whole = Ema(AdaptersOf(network), 0.9), Ema(network, 0.9)
    optimizer = torch.optim.SGD(adapters(network), 0.1)
    for _ in range(3):
        network(*batch()).square().sum().div(B).backward()
        optimizer.step()
        optimizer.zero_grad()
        own.update(network)
        whole.update(network)
    expected = apart(whole.state_dict())[1]
    assert own.state_dict().keys() == expected.keys()
    for name, weight in own.state_dict().items():
        assert torch.equal(weight, expected[name])
        assert not torch.equal(weight, network.state_dict()[name])


def test_written_and_read(tmp_path):
    factors = apart(moved().state_dict())[1]
    Adapters(factors, RANK, ALPHA, "s3://b/model").save(str(tmp_path))
    found = load_adapters(str(tmp_path))
    assert found is not None
    assert (found.rank, found.scale, found.base) == (RANK, 2.0, "s3://b/model")
    assert found.weights.keys() == factors.keys()
    assert all(torch.equal(found.weights[name], weight) for name, weight in factors.items())
    assert load_adapters(str(tmp_path / "nothing")) is None


def test_the_attention_of_joint_and_single_blocks():
    config = MMDiTConfig(
        in_channels=2, patch_size=2, width=8, depth=1, heads=1, single_depth=1,
        text_width=3, pooled_width=3, rotary=(4, 2, 2),
    )  # fmt: skip
    assert attention_layers(MMDiT(config)) == [
        "blocks.0.image.qkv",
        "blocks.0.image.out",
        "blocks.0.text.qkv",
        "blocks.0.text.out",
        "single_blocks.0.qkv",
        "single_blocks.0.out",
    ]
