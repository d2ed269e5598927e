import pytest
import torch
from small_dit import PATCH, SIZE, B, C, batch, opened, trained_dit
from torch import nn

from ldm_core.conditioning.channels import (
    ChannelConditioned,
    widen_convolution,
    widen_linear,
)
from ldm_core.conditioning.text import drop_extras

CHANNELS = {"mask": 4, "low": 2}


def widened_dit():
    dit = trained_dit()
    dit.patch_embedding = widen_linear(dit.patch_embedding, sum(CHANNELS.values()) * PATCH**2)
    return ChannelConditioned(dit, CHANNELS)


def inputs():
    x_t, t, cond = batch()
    for name, channels in CHANNELS.items():
        value = torch.randn(B, channels, SIZE, SIZE, dtype=torch.float64)
        cond = cond.with_extra(name, value)
    return x_t, t, cond


def test_widening_changes_no_bit_and_can_be_learnt():
    x_t, t, cond = inputs()
    network = widened_dit()
    out = network(x_t, t, cond)
    assert torch.equal(out, trained_dit()(x_t, t, cond))
    out.square().sum().backward()
    embedding = network.network.patch_embedding
    gradient = embedding.added.weight.grad
    assert (gradient.abs().amax(dim=0) > 0).all()  # every column of every condition
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widening_changes_no_bit_in_short_numbers_either(dtype):
    layer, x = nn.Linear(12, 32).to(dtype), torch.randn(B, 16, 36, dtype=dtype)
    assert torch.equal(widen_linear(layer, 24)(x), layer(x[..., :12]))


def test_a_widened_layer_is_one_longer_layer():
    layer = opened(widen_linear(nn.Linear(12, 32).double(), 24))
    x = torch.randn(B, 16, 36, dtype=torch.float64)
    weight = torch.cat([layer.trained.weight, layer.added.weight], dim=1)
    expected = nn.functional.linear(x, weight, layer.trained.bias)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_convolutions_widen_too(dimensions):
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    layer = kind(3, 8, 3, stride=2, padding=1).double()
    x = torch.randn(2, 5, *[6] * dimensions, dtype=torch.float64)
    wide = widen_convolution(layer, 2)
    assert torch.equal(wide(x), layer(x[:, :3]))
    opened(wide)
    together = kind(5, 8, 3, stride=2, padding=1).double()
    together.weight.data = torch.cat([wide.trained.weight, wide.added.weight], dim=1)
    together.bias.data = wide.trained.bias
    torch.testing.assert_close(wide(x), together(x), rtol=0, atol=1e-13)


def test_absent_dropped_and_zero_are_the_same():
    network, (x_t, t, cond) = opened(widened_dit()), inputs()
    out = network(x_t, t, cond)
    plain = batch()[2]
    low = cond.extras["low"].value
    absent = network(x_t, t, plain.with_extra("low", low))
    dropped = drop_extras(cond, {"mask": torch.zeros(B)}, {"mask": 0.1})
    assert torch.equal(network(x_t, t, dropped), absent)
    zeros = cond.with_extra("mask", torch.zeros(B, 4, SIZE, SIZE))
    assert torch.equal(network(x_t, t, zeros), absent)
    assert (out - absent).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    one = cond.scaled("mask", torch.tensor([0.0, 1.0, 1.0, 1.0]))
    expected = torch.cat([absent[:1], out[1:]])
    torch.testing.assert_close(network(x_t, t, one), expected, rtol=0, atol=1e-13)


def test_strength_interpolates_from_absence():
    network, (x_t, t, cond) = opened(widened_dit()), inputs()
    halved = cond.with_extra("mask", cond.extras["mask"].value / 2)
    assert torch.equal(network(x_t, t, cond.scaled("mask", 0.5)), network(x_t, t, halved))


def test_conditions_are_not_exchangeable():
    network, (x_t, t, cond) = opened(widened_dit()), inputs()
    out = network(x_t, t, cond)
    for name in CHANNELS:
        other = network(x_t, t, cond.with_extra(name, cond.extras[name].value.flip(1)))
        assert (other - out).abs().max() > 1e-3


def test_wrong_shapes_are_refused_with_both():
    network, (x_t, t, cond) = widened_dit(), inputs()
    short = cond.with_extra("mask", torch.zeros(B, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\), .* \(4, 3, 8, 8\) needs \(4, 4, 8, 8\)"):
        network(x_t, t, short)
    narrow = cond.with_extra("low", torch.zeros(B, 2, SIZE, 4))
    with pytest.raises(ValueError, match=r"'low' is \(4, 2, 8, 4\), .* needs \(4, 2, 8, 8\)"):
        network(x_t, t, narrow)
    with pytest.raises(ValueError, match=r"has 32 features, .* takes 12 \+ 24"):
        network(x_t[:, : C - 1], t, cond)  # a latent of another model
    with pytest.raises(ValueError, match=r"has 12 features, .* takes 12 \+ 24"):
        network.network(x_t, t, cond)
