import math

import pytest
import torch
from analytic import caption
from gaussians import captions, each_process, gaussian, some_states, some_times

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.guidance.adaptive_projected import AdaptiveProjection
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.heun import sample_heun

COND, NULL = captions([0.7, 0.1, -0.4]), caption(-0.2, 1.0)
GRID = linear_grid(4, dtype=torch.float64)
SHAPE = (3, 4, 4)
ONE = torch.ones((), dtype=torch.float64)


def apg(process, scale, prediction=Prediction.VELOCITY, **rule):
    rule = AdaptiveProjection(**rule)
    return ClassifierFreeGuidance(gaussian(process, prediction), scale, NULL, rule=rule)


def estimates(process, x_t, t):
    plain = gaussian(process)
    return plain.denoise(x_t, t, COND), plain.denoise(x_t, t, NULL.expand(len(x_t)))


def dot(a, b):
    return (a * b).sum(dim=(1, 2, 3))


@pytest.mark.parametrize("process", **each_process)
def test_nothing_projected_is_classifier_free_guidance(process):
    t = some_times(process, 3)
    x_t = some_states(process, t)
    plain = ClassifierFreeGuidance(gaussian(process), 3.0, NULL)
    for method in ("denoise", "velocity"):
        result = getattr(apg(process, 3.0, eta=1.0), method)(x_t, t, COND)
        expected = getattr(plain, method)(x_t, t, COND)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", **each_process)
def test_what_is_left_is_orthogonal_and_short(process):
    t = some_times(process, 3)
    x_t = some_states(process, t)
    d_c, d_u = estimates(process, x_t, t)
    update = (apg(process, 3.0, eta=0.0).denoise(x_t, t, COND) - d_c) / 2
    assert dot(update, d_c).abs().max() < 1e-11
    whole = (d_c - d_u).square().sum(dim=(1, 2, 3))
    along = dot(d_c - d_u, d_c).square() / dot(d_c, d_c)
    torch.testing.assert_close(dot(update, update) + along, whole)  # Pythagoras
    short = apg(process, 3.0, eta=1.0, longest=0.01).denoise(x_t, t, COND) - d_c
    torch.testing.assert_close(dot(short, short).sqrt(), torch.full((3,), 0.02).double())


@pytest.mark.parametrize("process", **each_process)
def test_it_acts_on_data_whatever_the_network_predicts(process):
    t = some_times(process, 3)
    x_t = some_states(process, t)
    expected = apg(process, 4.0, eta=0.2, longest=2.0).velocity(x_t, t, COND)
    for prediction in Prediction:
        result = apg(process, 4.0, prediction, eta=0.2, longest=2.0).velocity(x_t, t, COND)
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def test_scale_one_is_the_limit():
    """Some implementations add w times the projection to D_u instead, which has another limit."""
    t = some_times(FlowProcess(), 3)
    x_t = some_states(FlowProcess(), t)
    d_c, _ = estimates(FlowProcess(), x_t, t)
    near = apg(FlowProcess(), 1 + 1e-9, eta=0.0).denoise(x_t, t, COND)
    torch.testing.assert_close(near, d_c, rtol=0, atol=1e-8)


def their_x0(guider, step, t, x_t):
    guider.set_state(step, len(GRID) - 1, t)
    guider.prepare_inputs({"x": (x_t, x_t)})
    return guider.forward(*estimates(FlowProcess(), x_t, t)).pred


RULES = [{"eta": 1.0}, {"eta": 0.0}, {"eta": 0.3, "longest": 1.5},
         {"eta": 0.0, "longest": 1.5, "momentum": -0.5}]  # fmt: skip


def differs_from_diffusers(rule, space):
    """Greatest difference of the x0 along our trajectory; their scale is Ho & Salimans's here."""
    guiders = pytest.importorskip("diffusers.guiders")
    theirs = guiders.AdaptiveProjectedGuidance(
        guidance_scale=3.0,
        eta=rule.get("eta", 0.0),
        adaptive_projected_guidance_rescale=rule.get("longest", 0.0),
        adaptive_projected_guidance_momentum=rule.get("momentum"),
        use_original_formulation=True,
    )
    guided = apg(FlowProcess(), 4.0, **rule)
    guided.rule.space = space
    differences = []

    def compare(event):
        expected = their_x0(theirs, event.index, event.t, event.x_t)
        differences.append(float((event.x0 - expected).abs().max()))

    x_T = some_states(FlowProcess(), torch.ones(3, dtype=torch.float64), SHAPE)
    sample_euler(guided, x_T, GRID, COND, compare)
    return max(differences)


@pytest.mark.parametrize("rule", RULES)
def test_diffusers_agrees_in_x0_space(rule):
    assert differs_from_diffusers(rule, Prediction.X0) < 1e-12


@pytest.mark.parametrize("rule", RULES[1:])
def test_the_wrong_space_is_noticed(rule):
    assert differs_from_diffusers(rule, Prediction.VELOCITY) > 1e-2


class TestMomentum:
    good, bad = torch.full((1, *SHAPE), 2.0).double(), torch.full((1, *SHAPE), 1.0).double()

    def update(self, rule, t):
        """delta, from a scale of 2 and nothing projected."""
        guided = rule(self.good, self.bad, 2 * ONE, torch.full((1, 1, 1, 1), t).double())
        return float((guided - self.good).mean())

    def test_adds_up_geometrically(self):
        rule = AdaptiveProjection(eta=1.0, momentum=-0.5)
        deltas = [self.update(rule, t) for t in (1.0, 0.7, 0.5, 0.2)]
        assert deltas == pytest.approx([1.0, 0.5, 0.75, 0.625])

    def test_a_second_look_at_one_time_replaces_the_first(self):
        rule = AdaptiveProjection(eta=1.0, momentum=-0.5)
        deltas = [self.update(rule, t) for t in (1.0, 0.7, 0.7, 0.2)]
        assert deltas == pytest.approx([1.0, 0.5, 0.5, 0.75])

    def test_one_trajectory_only(self):
        rule = AdaptiveProjection(eta=1.0, momentum=-0.5)
        self.update(rule, 0.2)
        with pytest.raises(ValueError, match="came to t = 0.2 and was asked at 1: make"):
            self.update(rule, 1.0)

    @pytest.mark.parametrize("sample", [sample_euler, sample_heun])
    def test_without_momentum_nothing_is_remembered(self, sample):
        guided = apg(FlowProcess(), 4.0, eta=0.0)
        x_T = some_states(FlowProcess(), torch.ones(3, dtype=torch.float64), SHAPE)
        assert torch.equal(sample(guided, x_T, GRID, COND), sample(guided, x_T, GRID, COND))


def test_half_precision_does_not_overflow():
    """The squared length of a real latent is beyond float16's 65,504."""

    def network(x_t, t, cond):
        return x_t * cond.pooled[:, 0].reshape(-1, 1, 1, 1).to(x_t.dtype)

    x_t = torch.full((3, 16, 64, 64), 3.0, dtype=torch.float16)
    assert (x_t * x_t).sum() == math.inf
    denoiser = Denoiser(network, FlowProcess(), Prediction.X0)
    rule = AdaptiveProjection(eta=0.5, longest=10.0)
    x0 = ClassifierFreeGuidance(denoiser, 3.0, NULL, rule=rule).denoise(x_t, 0.5, COND)
    assert x0.dtype == torch.float16
    d_c = torch.tensor([0.7, 0.1, -0.4]) * 3
    expected = d_c + 2 * 0.5 * 10.0 / 256 * torch.tensor([1.0, 1.0, -1.0])  # 65,536 dimensions
    torch.testing.assert_close(x0[:, 0, 0, 0].float(), expected, rtol=2e-3, atol=2e-3)
