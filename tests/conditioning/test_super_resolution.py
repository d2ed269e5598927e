import pytest
import torch
import torch.nn.functional as F
from small_dit import PATCH, POOLED, SIZE, B, C, batch, opened, trained_dit

from ldm_core.conditioning.channels import ChannelConditioned, widen_linear
from ldm_core.conditioning.super_resolution import (
    LATENT,
    LEVEL,
    super_resolution,
    with_low_resolution,
)
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas

FLOW = FlowProcess()
PROCESSES = [FLOW, VarianceExploding(), VPSDE(), DiscreteVP(linear_betas()), TrigFlow()]
LOW = torch.randn(B, C, 4, 4, dtype=torch.float64)
EPS = torch.randn(B, C, SIZE, SIZE, dtype=torch.float64)
LARGE = F.interpolate(LOW, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def widened():
    dit = trained_dit()
    dit.patch_embedding = widen_linear(dit.patch_embedding, C * PATCH**2)
    return dit


def noised(level, process=FLOW):
    times = torch.as_tensor(level, dtype=torch.float64).expand(B)
    return with_low_resolution(batch()[2], LOW, process, times, EPS)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_no_noise_is_plain_concatenation(process):
    assert torch.equal(noised(0.0, process).extras[LATENT].value, LARGE)


def test_no_noise_is_plain_concatenation_for_the_network():
    x_t, t, cond = batch()
    network = super_resolution(opened(widened()), C, POOLED).double()
    plain = ChannelConditioned(network.network.network, {LATENT: C})
    expected = plain(x_t, t, cond.with_extra(LATENT, LARGE))
    assert torch.equal(network(x_t, t, noised(0.0)), expected)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_each_sample_has_its_own_level(process):
    levels = torch.linspace(0, 0.9, B, dtype=torch.float64)
    value = noised(levels, process).extras[LATENT].value
    for row, level in enumerate(levels):
        expected = process.alpha(level) * LARGE[row] + process.sigma(level) * EPS[row]
        assert torch.equal(value[row], expected)


def test_a_trained_network_starts_as_itself_then_hears_latent_and_level():
    x_t, t, cond = batch()
    network = super_resolution(widened(), C, POOLED).double()
    assert torch.equal(network(x_t, t, noised(0.3)), trained_dit()(x_t, t, cond))
    out = opened(network)(x_t, t, noised(0.3))
    level = noised(0.3).with_extra(LEVEL, torch.full((B, 1), 0.31))
    assert (network(x_t, t, level) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-5
    latent = noised(0.3).with_extra(LATENT, LARGE)
    assert (network(x_t, t, latent) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-5


def test_other_channels_are_refused_with_both():
    with pytest.raises(ValueError, match=r"\(4, 2, 4, 4\) and noise \(4, 3, 8, 8\)"):
        with_low_resolution(batch()[2], LOW[:, :2], FlowProcess(), torch.zeros(B), EPS)
