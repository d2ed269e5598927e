"""Linear layers in 8 bits: exact where 8 bits are, and else as near as their mantissas."""

import copy

import pytest
import torch
from parallel_runs import CPU, sample_losses, video_dit
from parallel_runs import Case as Training
from torch import nn

from ldm_core.training.float8 import Float8Linear, use_float8
from ldm_core.training.layout import Layout
from ldm_core.training.recomputation import recompute_all, recompute_cheap
from ldm_core.training.step import autocast

SIDES = (32, 48)


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A layer, and the same in 8 bits."""
    torch.manual_seed(0)
    plain = nn.Linear(*SIDES, bias=bias)
    rounded = copy.deepcopy(plain)
    use_float8(rounded)
    assert type(rounded) is Float8Linear
    return plain, rounded


def passes(layer: nn.Linear, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """What the forward and the backward pass give."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient.to(y.dtype))
    grads = [x.grad, layer.weight.grad, *([] if layer.bias is None else [layer.bias.grad])]
    return [y.detach(), *grads]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (3, 7), (5, 1)], ids=str)
def test_what_8_bits_hold_is_multiplied_exactly(bias, shape):
    """Powers of two and their halves, of whatever scale: no rounding in any of the products."""
    plain, rounded = pair(bias)
    choices = torch.tensor([0.0, 0.5, -0.5, 1.0, -2.0])
    generator = torch.Generator().manual_seed(1)

    def chosen(*shape: int, scale: float) -> torch.Tensor:
        picked = choices[torch.randint(len(choices), shape, generator=generator)]
        picked.view(-1)[0] = 2.0
        return scale * picked

    for layer in (plain, rounded):
        generator.manual_seed(2)
        layer.weight.data = chosen(SIDES[1], SIDES[0], scale=1e-3)
    x, gradient = chosen(*shape, SIDES[0], scale=37.0), chosen(*shape, SIDES[1], scale=1e-6)
    pairs = zip(passes(rounded, x, gradient), passes(plain, x, gradient), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_else_it_is_as_near_as_the_mantissas():
    """Of 3 and 2 bits, whose rounding errs by 2.6 and 5.2 % in the mean square."""
    plain, rounded = pair()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, SIDES[0], generator=generator)
    gradient = torch.randn(256, SIDES[1], generator=generator)
    limits = (0.045, 0.07, 0.07, 1e-6)  # values; what has to do with gradients; the bias
    found = zip(passes(rounded, x, gradient), passes(plain, x, gradient), limits, strict=True)
    for ours, theirs, limit in found:
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < limit
        assert error > limit / 4 or limit == 1e-6  # it has been in 8 bits


def test_nothing_is_nothing():
    _, rounded = pair(bias=False)
    for each in passes(rounded, torch.zeros(4, SIDES[0]), torch.zeros(4, SIDES[1])):
        assert not each.any()


def test_autocast_says_the_dtype():
    plain, rounded = pair()
    x = torch.randn(4, SIDES[0])
    with autocast(CPU, torch.bfloat16):
        assert rounded(x).dtype == plain(x).dtype == torch.bfloat16
    y = rounded(x.requires_grad_())
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, rounded.weight.grad.dtype) == (torch.float32,) * 3


def test_it_compiles_as_a_whole():
    _, rounded = pair()
    x, gradient = torch.randn(16, SIDES[0]), torch.randn(16, SIDES[1])
    eager = passes(rounded, x, gradient)
    rounded.zero_grad()
    rounded.forward = torch.compile(rounded.forward, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(passes(rounded, x, gradient), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layers_of_other_sides_stay_as_they_are():
    block = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 32), nn.Linear(32, 32))
    names = list(block.state_dict())
    use_float8(block)
    assert [type(each) for each in block] == [nn.Linear, nn.Linear, Float8Linear]
    assert list(block.state_dict()) == names


def gradients(rounded: bool, recompute=None) -> torch.Tensor:
    """Of a transformer's loss, in one vector."""
    network = video_dit()
    for block in network.blocks:
        if rounded:
            use_float8(block)
        if recompute:
            recompute(block)
    sample_losses(network, Training(Layout()), 0, list(range(4))).mean().backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters()])


def test_a_transformer_s_gradients():
    """Near those of float32, and the same whatever is computed again."""
    plain, rounded = gradients(False), gradients(True)
    assert 0.98 < float(torch.cosine_similarity(plain, rounded, dim=0)) < 0.99999
    for recompute in (recompute_all, recompute_cheap):
        assert torch.equal(gradients(True, recompute), rounded)
