from copy import deepcopy

import pytest
import torch
from small_dit import PATCH, SIZE, WIDTH, B, batch, opened, trained_dit
from torch import nn

from ldm_core.backbones.class_dit import ClassDiT, ClassDiTConfig
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.conditioning.channels import ChannelConditioned
from ldm_core.conditioning.control import Controlled
from ldm_core.conditioning.numbers import NumberConditioned
from ldm_core.conditioning.text import TextCondition, drop_extras
from ldm_core.errors import UserError

PIXELS = 4  # of the hint per latent


def controlled(dit, name="edges", depth=2, seed=3):
    torch.manual_seed(seed)
    blocks = trunk_of(dit).blocks[:depth]
    return Controlled(dit, blocks, name, WIDTH, channels=1, patch=PATCH * PIXELS)


def trunk_of(network):
    return trunk_of(network.network) if isinstance(network, Controlled) else network


def hinted(cond, name="edges", seed=4):
    torch.manual_seed(seed)
    return cond.with_extra(name, torch.randn(B, 1, SIZE * PIXELS, SIZE * PIXELS))


def test_the_branch_changes_no_bit_at_first_and_can_be_learnt():
    x_t, t, cond = batch()
    network = controlled(trained_dit())
    out = network(x_t, t, hinted(cond))
    assert torch.equal(out, trained_dit()(x_t, t, cond))
    out.square().sum().backward()
    for layer in network.out:
        assert layer.weight.grad.abs().max() > 0
    opened(network.out)
    network.zero_grad()
    network(x_t, t, hinted(cond)).square().sum().backward()
    assert network.hint.weight.grad.abs().max() > 0
    for name, parameter in network.blocks.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_copy_of_a_frozen_network_is_not_frozen():
    network = controlled(trained_dit().requires_grad_(False))
    trainable = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trainable == {"hint", "blocks", "out"}


def test_the_trunk_is_held_once():
    dit = trained_dit()
    network = controlled(dit)
    assert sum(name.startswith("network.") for name in network.state_dict()) == len(
        dit.state_dict()
    )
    assert not any(name.startswith("trunk") for name in network.state_dict())


def test_strength_zero_is_the_trunk():
    x_t, t, cond = batch()
    dit = trained_dit()
    network = opened(controlled(dit))
    plain, full = dit(x_t, t, cond), network(x_t, t, hinted(cond))
    assert (full - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.equal(network(x_t, t, hinted(cond).scaled("edges", 0.0)), plain)
    assert torch.equal(network(x_t, t, cond), plain)
    u = torch.tensor([0.05, 0.5, 0.02, 0.9])
    dropped = network(x_t, t, drop_extras(hinted(cond), {"edges": u}, {"edges": 0.1}))
    mixed = torch.where((u < 0.1).view(B, 1, 1, 1), plain, full)
    torch.testing.assert_close(dropped, mixed, rtol=0, atol=1e-13)


def test_a_hint_stays_where_it_is():
    x_t, t, cond = batch()
    network = opened(controlled(trained_dit(), depth=1))
    for block in (*network.trunk, *network.blocks, *trunk_of(network).blocks):
        nn.init.zeros_(block.attention.out.weight)  # tokens no longer see one another
        nn.init.zeros_(block.neighbours.kernel.weight)
    hint = hinted(cond).extras["edges"].value.clone()
    out = network(x_t, t, cond.with_extra("edges", hint))
    hint[..., 17, 9] += 1  # in the token of rows 16..23 and columns 8..15
    moved = (network(x_t, t, cond.with_extra("edges", hint)) - out).abs().amax(dim=(0, 1)) > 1e-12
    assert moved[4:6, 2:4].all()
    assert moved.sum() == PATCH**2


class Doubling(nn.Module):
    """A trunk of two blocks that can be followed by hand: x -> 4 x."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, x, *, shift):
            return self.factor * x + shift

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])

    def forward(self, x_t, t, cond):
        x = x_t.flatten(2).mT  # (B, N, C)
        for block in self.blocks:
            x = block(x, shift=1.0)
        return x


def test_the_recursion_by_hand():
    trunk = Doubling()
    network = Controlled(trunk, trunk.blocks, "hint", width=1, channels=1, patch=1)
    for layer, weight in ((network.hint, 3.0), (network.out[0], 5.0), (network.out[1], 7.0)):
        nn.init.constant_(layer.weight, weight)
    text = TextCondition(torch.zeros(2, 1, 1), torch.ones(2, 1) > 0, torch.zeros(2, 1))
    x, h = torch.randn(2, 2, 1, 1, 3, dtype=torch.float64)
    strength = torch.tensor([0.5, 2.0], dtype=torch.float64)
    out = network(x, strength, text.with_extra("hint", h, strength))
    s, c0, x0 = strength.view(2, 1, 1), (x + 3 * h).flatten(2).mT, x.flatten(2).mT
    c1 = 2 * c0 + 1
    x1 = 2 * x0 + 1 + s * 5 * c1
    c2 = 2 * c1 + 1
    torch.testing.assert_close(out, 2 * x1 + 1 + s * 7 * c2, rtol=0, atol=1e-12)


def test_two_branches_over_one_trunk():
    x_t, t, cond = batch()
    dit = trained_dit()
    edges = opened(controlled(dit))
    both = opened(controlled(edges, "depth", depth=1, seed=5))
    one, two = hinted(cond), hinted(hinted(cond), "depth", seed=6)
    assert torch.equal(both(x_t, t, one), edges(x_t, t, one))
    assert torch.equal(both(x_t, t, two.scaled("depth", 0.0)), edges(x_t, t, one))
    assert (both(x_t, t, two) - edges(x_t, t, one)).abs().max() > 1e-3


def test_no_hook_survives_a_call_even_a_failing_one():
    x_t, t, cond = batch()
    dit = trained_dit()
    network = controlled(dit)
    network(x_t, t, hinted(cond))
    with pytest.raises(ValueError, match="tokens"):
        network(x_t[..., :4], t, hinted(cond))
    assert not any(block._forward_hooks for block in dit.blocks)


def test_a_deep_copy_is_on_its_own():
    x_t, t, cond = batch()
    network = opened(controlled(trained_dit()))
    copy, expected = deepcopy(network), network(x_t, t, hinted(cond))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(copy(x_t, t, hinted(cond)), expected)


def test_a_hint_that_does_not_fit_is_refused_with_both():
    x_t, t, cond = batch()
    network = controlled(trained_dit())
    with pytest.raises(ValueError, match="'edges' has 3 channels, the branch takes 1"):
        network(x_t, t, cond.with_extra("edges", torch.zeros(B, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"\(4, 1, 16, 32\) makes 8 tokens .* has 16 for 4"):
        network(x_t, t, cond.with_extra("edges", torch.zeros(B, 1, 16, 32)))


LABELLED = ClassDiTConfig(
    in_channels=3, latent_size=(8, 8), width=32, depth=2, heads=2, classes=10
)  # fmt: skip
JOINT = MMDiTConfig(
    in_channels=3, patch_size=2, width=32, depth=2, heads=2, text_width=10, pooled_width=6
)


def test_networks_without_captions_or_image_tokens_are_refused():
    labelled, joint = ClassDiT(LABELLED), MMDiT(JOINT)
    with pytest.raises(UserError, match="Controlled .* ClassDiT takes labels"):
        Controlled(labelled, labelled.blocks, "edges", 32, 1, 2)
    with pytest.raises(UserError, match="ChannelConditioned .* ClassDiT takes labels"):
        ChannelConditioned(labelled, {"mask": 4})
    with pytest.raises(UserError, match="NumberConditioned .* ClassDiT takes labels"):
        NumberConditioned(nn.Sequential(labelled), "fps", 1, 6, (0.1, 1.0))
    for block in (0, 1):
        with pytest.raises(UserError, match="is a (Last)?JointBlock, which passes image and text"):
            Controlled(joint, [joint.blocks[block]], "edges", 32, 1, 2)


def test_blocks_that_are_given_tokens_by_name_are_refused():
    class ByName(Doubling):
        def forward(self, x_t, t, cond):
            return self.blocks[0](x=x_t.flatten(2).mT, shift=1.0)

    trunk = ByName()
    network = Controlled(trunk, trunk.blocks[:1], "hint", width=1, channels=1, patch=1)
    text = TextCondition(torch.zeros(2, 1, 1), torch.ones(2, 1) > 0, torch.zeros(2, 1))
    x, h = torch.randn(2, 2, 1, 1, 3, dtype=torch.float64)
    with pytest.raises(UserError, match="Block is given its tokens by name"):
        network(x, torch.zeros(2), text.with_extra("hint", h))
