"""Classifier-free guidance between Gaussians, on every process, by closed forms."""

import math

import pytest
import torch
from analytic import caption
from gaussians import each_process, gaussian, growth, moments, some_states, some_times, spread

from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import TrigFlow
from ldm_core.guidance.classifier_free import (
    ClassifierFreeGuidance,
    from_ho_salimans,
    to_ho_salimans,
)
from ldm_core.guidance.interval import log_sigma_interval

WIDE, NARROW = caption(0.0, 1.0), caption(0.0, 0.3)
VE = VarianceExploding(80.0)


@pytest.mark.parametrize("process", **each_process)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_equal_widths_give_the_gaussian_in_between(process, scale):
    t = some_times(process, 7)
    x_t = some_states(process, t)
    guided = ClassifierFreeGuidance(gaussian(process), scale, caption(-0.2))
    expected = gaussian(process), caption(-0.2 + scale * 0.9, batch=7)
    for method in ("denoise", "velocity"):
        result = getattr(guided, method)(x_t, t, caption(0.7, batch=7))
        exact = getattr(expected[0], method)(x_t, t, expected[1])
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


def test_equal_widths_are_sampled_exactly():
    guided = ClassifierFreeGuidance(gaussian(FlowProcess()), 3.0, caption(-0.2))
    assert moments(guided, caption(0.7), 1.0, 0.0) == pytest.approx((2.5, 0.4), abs=1e-9)


def test_unequal_widths_on_the_variance_exploding_process():
    guided = ClassifierFreeGuidance(gaussian(VE), 3.0, WIDE)
    _, std = moments(guided, NARROW, 80.0, 0.0, start=80.0)
    formula = 80 * (0.09 / (0.09 + 6400)) ** 1.5 * (1 / 6401) ** -1.0
    assert formula == pytest.approx(0.0270036, abs=5e-8)
    assert std == pytest.approx(formula, rel=1e-9)
    tilted = (3 / 0.09 - 2 / 1) ** -0.5  # of the density p_c^3 / p_u^2, which it does not sample
    assert tilted == pytest.approx(0.1786, abs=1e-4)


@pytest.mark.parametrize("process", **each_process)
def test_unequal_widths_on_every_process(process):
    low, high = (float(t) for t in some_times(process, 2).sort().values)
    kinks = [t / 8 for t in range(7, 0, -1) if low < t / 8 < high]  # of the table
    guided = ClassifierFreeGuidance(gaussian(process), 3.0, WIDE)
    _, factor = moments(guided, NARROW, high, *kinks, low)
    expected = growth(process, 0.3, high, low) ** 3 * growth(process, 1.0, high, low) ** -2
    assert factor == pytest.approx(expected, rel=1e-8)


def test_interval_is_a_product_of_pieces():
    low, high = log_sigma_interval(VE, math.log(0.2), math.log(2.0))
    guided = ClassifierFreeGuidance(gaussian(VE), 3.0, WIDE, (low, high))
    _, std = moments(guided, NARROW, 80.0, high, low, 0.0, start=80.0)
    inside = growth(VE, 0.3, 2.0, 0.2) ** 3 * growth(VE, 1.0, 2.0, 0.2) ** -2
    pieces = 80 * growth(VE, 0.3, 80.0, 2.0) * inside * growth(VE, 0.3, 0.2, 0.0)
    assert pieces == pytest.approx(0.0458432, abs=5e-8)
    assert std == pytest.approx(pieces, rel=1e-9)


@pytest.mark.parametrize("process", [FlowProcess(), TrigFlow()])
def test_an_interval_of_noise_means_the_same_on_every_process(process):
    """Away from the prior, whose end is not the same, only x_t / alpha_t and its noise matter."""
    outer = log_sigma_interval(process, math.log(0.05), math.log(20.0))

    def factor(interval):
        guided = ClassifierFreeGuidance(gaussian(process), 3.0, WIDE, interval)
        low, high = interval
        _, std = moments(guided, NARROW, outer[1], high, low, outer[0])
        alphas = [float(process.alpha(torch.tensor(t, dtype=torch.float64))) for t in outer]
        return std * alphas[1] / alphas[0]

    inside = growth(VE, 0.3, 2.0, 0.2) ** 3 * growth(VE, 1.0, 2.0, 0.2) ** -2
    expected = growth(VE, 0.3, 20.0, 2.0) * inside * growth(VE, 0.3, 0.2, 0.05)
    interval = log_sigma_interval(process, math.log(0.2), math.log(2.0))
    assert factor(interval) == pytest.approx(expected, rel=1e-8)
    # the mutation: numbers of one process's time taken for another's
    assert factor((0.2, 0.9)) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("process", **each_process)
def test_ends_of_an_interval_of_noise(process):
    assert log_sigma_interval(process, -math.inf, math.inf) == (0.0, process.end)
    low, high = log_sigma_interval(process, -1.0, 0.5)
    for t, expected in ((low, -1.0), (high, 0.5)):
        t = torch.tensor(t, dtype=torch.float64)
        assert float((process.sigma(t) / process.alpha(t)).log()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="0.5 < -1, please"):
        log_sigma_interval(process, 0.5, -1.0)


def test_guidance_is_everywhere_unless_told_otherwise():
    """Noise of the variance-exploding process is far beyond t = 1."""
    guided = ClassifierFreeGuidance(gaussian(VE), 3.0, WIDE)
    x_t, t = torch.ones(1, 2, dtype=torch.float64), torch.tensor(40.0, dtype=torch.float64)
    expected = (spread(VE, 0.3, 40.0) ** 2, spread(VE, 1.0, 40.0) ** 2)
    shrink = 3 * 0.09 / expected[0] - 2 / expected[1]
    torch.testing.assert_close(guided.denoise(x_t, t, NARROW), shrink * x_t)


class TestConventions:
    """(1 + w') D_c - w' D_u is D_u + w (D_c - D_u) with w = w' + 1."""

    process = FlowProcess()
    t = some_times(process, 5)
    x_t = some_states(process, t)

    def theirs(self, scale):
        d_c = gaussian(self.process).denoise(self.x_t, self.t, caption(0.7, batch=5))
        d_u = gaussian(self.process).denoise(self.x_t, self.t, caption(-0.2, 1.0, batch=5))
        return (1 + scale) * d_c - scale * d_u

    def ours(self, scale):
        guided = ClassifierFreeGuidance(gaussian(self.process), scale, caption(-0.2, 1.0))
        return guided.denoise(self.x_t, self.t, caption(0.7, batch=5))

    @pytest.mark.parametrize("scale", [-1.0, 0.0, 2.0])
    def test_converted(self, scale):
        torch.testing.assert_close(self.ours(from_ho_salimans(scale)), self.theirs(scale))
        torch.testing.assert_close(self.ours(scale), self.theirs(to_ho_salimans(scale)))
        assert to_ho_salimans(from_ho_salimans(scale)) == scale

    def test_the_wrong_convention_is_noticed(self):
        assert (self.ours(2.0) - self.theirs(2.0)).abs().max() > 0.1


def test_a_model_without_a_null_condition():
    class Unconditional:
        def __call__(self, x_t, t, cond):
            return x_t

    denoiser = gaussian(VE)
    denoiser.network = Unconditional()
    with pytest.raises(ValueError, match="Unconditional has no null condition.*WeakPair"):
        ClassifierFreeGuidance(denoiser, 3.0, None)


def test_as_many_scales_as_samples():
    guided = ClassifierFreeGuidance(gaussian(VE), torch.tensor([2.0, 3.0]), WIDE)
    with pytest.raises(ValueError, match="2 guidance scales for a batch of 3"):
        guided.denoise(torch.zeros(3, 2), 1.0, NARROW.expand(3))
