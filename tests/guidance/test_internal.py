import copy

import pytest
import torch
from analytic import caption
from gaussians import gaussian, growth, moments, some_states, some_times
from torch import nn

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, add_noise
from ldm_core.diffusion.variance_preserving import VPSDE
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.guidance.guided import Guided
from ldm_core.guidance.internal import (
    InternalPair,
    TokenHead,
    TwoHeaded,
    internal_guidance_loss,
)

FLOW = FlowProcess()
COND = caption(0.7, 0.4, 3)


class Toy(nn.Module):
    """A block and then the velocity of N(m, S^2); the block passes its input on, and counts."""

    def __init__(self):
        super().__init__()
        self.block, self.calls = nn.Identity(), 0

    def forward(self, x_t, t, cond):
        self.calls += 1
        return gaussian(FLOW).network(self.block(x_t), t, cond)


class WiderHead(nn.Module):
    """The velocity of N(0, 0.6^2)."""

    calls = 0

    def forward(self, hidden, x_t, t):
        self.calls += 1
        return gaussian(FLOW).network(hidden, t, caption(0.0, 0.6, len(x_t)))


def toy_pair():
    return InternalPair(TwoHeaded(Toy(), "block", WiderHead()), FLOW, Prediction.VELOCITY)


def test_the_middle_is_a_weak_model():
    _, std = moments(Guided(toy_pair(), 2.0), caption(0.0, 0.4), 1.0, 0.0)
    assert std == pytest.approx(growth(FLOW, 0.4, 1.0, 0.0) ** 2 / 0.6, rel=1e-9)


@pytest.mark.parametrize("method", ["denoise", "velocity"])
def test_data_and_velocity(method):
    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    final, middle = (
        getattr(gaussian(FLOW), method)(x_t, t, c) for c in (COND, caption(0.0, 0.6, 3))
    )
    result = getattr(Guided(toy_pair(), 2.0), method)(x_t, t, COND)
    torch.testing.assert_close(result, 2 * final - middle)


@pytest.mark.parametrize(("scale", "heads"), [(2.0, 1), (1.0, 0)])
def test_one_pass_and_the_head_only_where_guided(scale, heads):
    pair = toy_pair()
    Guided(pair, scale).denoise(torch.randn(3, 2).double(), 0.5, COND)
    assert (pair.network.network.calls, pair.network.head.calls) == (1, heads)
    assert not pair.network.network.block._forward_hooks


def test_under_classifier_free_guidance():
    """Two guidances, one batch of 2B: the inner one's linear, so the order does not matter."""
    pair, null = toy_pair(), caption(-0.3, 1.0)
    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    result = ClassifierFreeGuidance(Guided(pair, 2.0), 3.0, null).velocity(x_t, t, COND)
    v_c, v_u = (gaussian(FLOW).velocity(x_t, t, c) for c in (COND, null.expand(3)))
    middle = gaussian(FLOW).velocity(x_t, t, caption(0.0, 0.6, 3))
    inner = [middle + 2 * (v - middle) for v in (v_c, v_u)]
    torch.testing.assert_close(result, inner[1] + 3 * (inner[0] - inner[1]))
    assert pair.network.network.calls == 1


def small_dit():
    config = DiTConfig(
        in_channels=3, latent_size=(4, 6), patch_size=2, width=16, depth=3, heads=2,
        text_width=1, pooled_width=2,
    )  # fmt: skip
    torch.manual_seed(0)
    network = TwoHeaded(DiT(config), "blocks.1", TokenHead(16, 3, 2)).double()
    with torch.no_grad():  # a fresh network and head are zero
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def test_a_head_on_a_transformer():
    network = small_dit()
    x_t, t = torch.randn(3, 3, 4, 6).double(), torch.rand(3).double()
    final, middle = network(x_t, t, COND)
    assert final.shape == middle.shape == x_t.shape
    assert torch.equal(final, network.network(x_t, t, COND))  # which is as it was
    cut = copy.deepcopy(network)
    cut.network.blocks[2] = nn.Identity()  # nothing after the block matters to the head ...
    cut.network.blocks[2].forward = lambda x, *_: x
    again, same = cut(x_t, t, COND)
    assert torch.equal(same, middle)
    assert not torch.allclose(again, final)  # ... as it does to the network


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_heads_loss_reaches_what_is_below_it(weight):
    network = small_dit()
    x0, eps = torch.randn(2, 3, 3, 4, 6).double()
    loss = internal_guidance_loss(
        network, FLOW, Prediction.VELOCITY, x0, eps, torch.rand(3).double(), COND, weight
    )
    assert loss.shape == (3,)
    loss.sum().backward()
    assert bool(network.head.out.weight.grad.any()) == (weight > 0)
    # with the final layer's part taken away, only blocks up to the head have a gradient
    network.zero_grad()
    x_t = add_noise(FLOW, x0, eps, torch.full((3,), 0.5).double())
    network(x_t, torch.full((3,), 0.5).double(), COND)[1].square().sum().backward()
    assert network.network.blocks[1].mlp.out.weight.grad.any()
    assert network.network.blocks[2].mlp.out.weight.grad is None


@pytest.mark.parametrize("prediction", list(Prediction))
def test_the_loss_is_of_what_is_predicted(prediction):
    """Data of one point are known exactly, and both heads that say so have no loss."""
    process, point = VPSDE(), torch.full((3, 2, 4, 4), 0.7).double()
    eps, t = torch.randn_like(point), some_times(process, 3)

    def network(x_t, t, cond):
        known = Denoiser(lambda *_: point, process, Prediction.X0)
        value = known._predict(x_t, t, cond, prediction)
        return value, value + 1

    loss = internal_guidance_loss(network, process, prediction, point, eps, t, None, 0.3)
    torch.testing.assert_close(loss, torch.full((3,), 0.3).double())


def test_a_block_that_is_not_there():
    with pytest.raises(ValueError, match="Toy has no block 'blocks.7': take one of block"):
        TwoHeaded(Toy(), "blocks.7", WiderHead())
