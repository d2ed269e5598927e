"""Pairs, rules, intervals, rescaling and samplers in combination."""

import math

import pytest
import torch
from analytic import caption
from gaussians import captions, each_process, gaussian, some_states, some_times, velocity_of

from ldm_core.diffusion.process import FlowProcess
from ldm_core.guidance.adaptive_projected import AdaptiveProjection
from ldm_core.guidance.autoguidance import WeakPair
from ldm_core.guidance.classifier import ClassifierGuidance
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance, NullPair
from ldm_core.guidance.guided import Guided
from ldm_core.guidance.interval import log_sigma_interval
from ldm_core.guidance.rescale import Rescaled
from ldm_core.guidance.zero_star import ZeroInit, ZeroStar

COND, NULL = captions([0.7, 0.1, -0.4]), caption(-0.2, 1.0)
FLOW = FlowProcess()


@pytest.mark.parametrize("rule", [AdaptiveProjection(0.2, 2.0), ZeroStar()])
@pytest.mark.parametrize("process", **each_process)
def test_interval_of_a_rule(process, rule):
    """Inside it is the rule, outside the plain model, each sample by itself; passes follow."""
    passes = []
    t = some_times(process, 3)  # ln(sigma / alpha) = 1.5, 0, -1.5
    x_t = some_states(process, t)
    denoiser = gaussian(process, passes=passes)
    interval = log_sigma_interval(process, -1.0, 1.0)
    within = ClassifierFreeGuidance(denoiser, 4.0, NULL, interval, rule)
    always = ClassifierFreeGuidance(denoiser, 4.0, NULL, rule=rule)
    plain, whole = denoiser.denoise(x_t, t, COND), always.denoise(x_t, t, COND)
    passes.clear()
    result = within.denoise(x_t, t, COND)
    torch.testing.assert_close(result, torch.stack([plain[0], whole[1], plain[2]]))
    assert passes == [6]
    passes.clear()
    assert torch.equal(within.denoise(x_t, float(t[0]), COND), denoiser.denoise(x_t, t[0], COND))
    assert passes == [3, 3]


@pytest.mark.parametrize("rule", [AdaptiveProjection(0.2, 2.0), ZeroStar()])
def test_rescaled_rules(rule):
    passes = []
    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    denoiser = gaussian(FLOW, passes=passes)
    guided = ClassifierFreeGuidance(denoiser, 4.0, NULL, rule=rule)
    v = Rescaled(guided, 1.0).velocity(x_t, t, COND)
    assert passes == [6]
    plain, raw = denoiser.velocity(x_t, t, COND), guided.velocity(x_t, t, COND)
    torch.testing.assert_close(v.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)))
    ratio = v / raw
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))  # one number a sample


def test_projection_from_a_weak_model():
    weak = gaussian(FLOW)

    class Wider:
        process = FLOW

        def denoise(self, x_t, t, cond):
            return weak.denoise(x_t, t, NULL.expand(len(x_t)))

    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    by_model = Guided(WeakPair(gaussian(FLOW), Wider()), 3.0, AdaptiveProjection(0.1))
    by_null = Guided(NullPair(gaussian(FLOW), NULL), 3.0, AdaptiveProjection(0.1))
    result, expected = (guided.denoise(x_t, t, COND) for guided in (by_model, by_null))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_nested_free_guidances_multiply():
    """Guidance by w1 from a, then by w2 from b: linear in the three estimates."""
    a, b = caption(-0.2, 1.0), caption(0.3, 0.6)
    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    passes = []
    inner = ClassifierFreeGuidance(gaussian(FLOW, passes=passes), 2.0, a)
    result = ClassifierFreeGuidance(inner, 3.0, b).denoise(x_t, t, COND)
    assert passes == [12]  # one batch
    d_c, d_a, d_b = (gaussian(FLOW).denoise(x_t, t, c.expand(3)) for c in (COND, a, b))
    inner_c, inner_b = d_a + 2 * (d_c - d_a), d_a + 2 * (d_b - d_a)
    torch.testing.assert_close(result, inner_b + 3 * (inner_c - inner_b))


def test_classifier_on_top_of_free_guidance():
    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    free = ClassifierFreeGuidance(gaussian(FLOW), 3.0, NULL)
    both = ClassifierGuidance(free, lambda x, t, cond: 0.5 * x.square().sum(dim=(1, 2, 3)), 0.1)
    sigma, alpha = FLOW.sigma(t).reshape(3, 1, 1, 1), FLOW.alpha(t).reshape(3, 1, 1, 1)
    expected = free.denoise(x_t, t, COND) + 0.1 * sigma**2 / alpha * x_t
    torch.testing.assert_close(both.denoise(x_t, t, COND), expected)


def stacks():
    """Whatever is composed stays one denoiser."""
    free = ClassifierFreeGuidance(gaussian(FLOW), 4.0, NULL, rule=AdaptiveProjection(0.1, 2.0))
    star = ClassifierFreeGuidance(gaussian(FLOW), 4.0, NULL, (0.1, 0.8), ZeroStar())
    likelihood = lambda x, t, cond: -x.square().sum(dim=(1, 2, 3))  # noqa: E731
    return [free, star, Rescaled(free, 0.7), ZeroInit(Rescaled(star, 0.7), 0.9),
            ClassifierGuidance(Rescaled(free, 0.7), likelihood, 0.1)]  # fmt: skip


@pytest.mark.parametrize("guided", stacks(), ids=range(5))
def test_velocity_and_data_say_the_same(guided):
    t = some_times(FLOW, 3)
    x_t = some_states(FLOW, t)
    x0, v = guided.denoise(x_t, t, COND), guided.velocity(x_t, t, COND)
    torch.testing.assert_close(velocity_of(x0, x_t, t, FLOW), v, rtol=1e-11, atol=1e-11)
    assert math.isfinite(float(v.abs().max()))
    times = torch.full((3,), 0.4, dtype=torch.float64)
    torch.testing.assert_close(guided.denoise(x_t, 0.4, COND), guided.denoise(x_t, times, COND))
