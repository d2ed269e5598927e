import math

import numpy as np
import pytest
import torch
from analytic import caption
from gaussians import captions, each_process, gaussian, levels, some_states, some_times

from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.process import FlowProcess
from ldm_core.errors import UserError
from ldm_core.guidance.classifier import (
    ClassifierGuidance,
    classifier_loss,
    label_likelihood,
)
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.guidance.interval import log_sigma_interval
from ldm_core.samplers.euler import sample_euler

COND, NULL = captions([0.7, 0.1, -0.4]), caption(-0.2, 1.0)


class Unconditional:
    """The denoiser of N(-0.2, 1), whatever is asked."""

    def __init__(self, process):
        self.inner, self.process = gaussian(process), process

    def denoise(self, x_t, t, cond):
        return self.inner.denoise(x_t, t, NULL.expand(len(x_t)))

    def velocity(self, x_t, t, cond):
        return self.inner.velocity(x_t, t, NULL.expand(len(x_t)))


def bayes(process, calls=None):
    """ln p(x_t | y) - ln p(x_t), which is ln p(y | x_t) but for a constant."""

    def log_density(x_t, t, cond):
        m, _, alpha, _, v = levels(process, t, cond, x_t)
        return (-(v.log()) / 2 - (x_t - alpha * m) ** 2 / v / 2).sum(dim=tuple(range(1, x_t.ndim)))

    def log_likelihood(x_t, t, cond):
        if calls is not None:
            calls.append(len(x_t))
        return log_density(x_t, t, cond) - log_density(x_t, t, NULL.expand(len(x_t)))

    return log_likelihood


@pytest.mark.parametrize("process", **each_process)
@pytest.mark.parametrize("method", ["denoise", "velocity"])
def test_bayes_rule_makes_the_conditional_denoiser(process, method):
    t = some_times(process, 3)
    x_t = some_states(process, t)
    guided = ClassifierGuidance(Unconditional(process), bayes(process))
    with torch.no_grad():  # as samplers run
        result = getattr(guided, method)(x_t, t, COND)
    expected = getattr(gaussian(process), method)(x_t, t, COND)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    strong = ClassifierGuidance(Unconditional(process), bayes(process), 3.0)
    free = ClassifierFreeGuidance(gaussian(process), 3.0, NULL)
    result, expected = (getattr(g, method)(x_t, t, COND) for g in (strong, free))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_the_wrong_space_is_noticed():
    """The mutation: the gradient added to x0 as if that were the score."""
    process = FlowProcess()
    t = some_times(process, 3)
    x_t = some_states(process, t)
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(bayes(process)(x, t, COND).sum(), x)
    wrong = Unconditional(process).denoise(x_t, t, COND) + gradient
    assert (wrong - gaussian(process).denoise(x_t, t, COND)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("scale", "times", "asked"),
    [(1.0, [0.5] * 3, 1), (0.0, [0.5] * 3, 0), (1.0, [0.95] * 3, 0), (1.0, [0.5, 0.95, 0.5], 1)],
)
def test_the_classifier_is_asked_only_where_guided(scale, times, asked):
    process, calls = FlowProcess(), []
    interval = log_sigma_interval(process, -math.inf, 2.0)
    guided = ClassifierGuidance(Unconditional(process), bayes(process, calls), scale, interval)
    t = torch.tensor(times, dtype=torch.float64)
    x_t = some_states(process, t)
    result, plain = (d.denoise(x_t, t, COND) for d in (guided, Unconditional(process)))
    assert calls == [3] * asked
    expected = gaussian(process).denoise(x_t, t, COND)
    inside = (t < interval[1]) & (scale > 0)
    expected = torch.where(inside.reshape(3, 1, 1, 1), expected, plain)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_pure_noise_is_no_obstacle():
    """At alpha = 0 the first step goes unguided, an error of the order of a step."""
    errors = []
    for steps in (50, 100, 200):
        process = FlowProcess()
        guided = ClassifierGuidance(Unconditional(process), bayes(process), least_alpha=1e-4)
        x_T = some_states(process, torch.ones(3, dtype=torch.float64))
        grid = linear_grid(steps, dtype=torch.float64)
        samples = sample_euler(guided, x_T, grid, COND)
        assert samples.isfinite().all()
        m, s2, *_ = levels(process, grid[:1], COND, x_T)
        errors.append(float((samples - m - s2.sqrt() * x_T).abs().max()))
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([1.0, 1.0], abs=0.15)


class TestTwoClasses:
    """Half N(0.7, .4^2), half N(-0.3, .4^2): the exact classifier is logistic in x_t."""

    process = FlowProcess()
    t = torch.tensor([0.3, 0.6, 0.9, 0.6], dtype=torch.float64)
    x_t = torch.tensor([[0.4], [-1.0], [0.2], [1.5]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    both = caption(0.7), caption(-0.3)

    def logits(self, x_t, t):
        columns = []
        for cond in self.both:
            m, _, alpha, _, v = levels(self.process, t, cond.expand(len(x_t)), x_t)
            columns.append(-((x_t - alpha * m) ** 2) / v / 2)
        return torch.cat(columns, dim=1)

    def test_guidance_by_a_label_picks_the_component(self):
        each = [gaussian(self.process).denoise(self.x_t, self.t, c.expand(4)) for c in self.both]
        weights = self.logits(self.x_t, self.t).softmax(dim=1)
        mixture = (torch.cat(each, dim=1) * weights).sum(dim=1, keepdim=True)

        class Mixture:
            process = self.process

            def denoise(self, x_t, t, cond):
                return mixture

        guided = ClassifierGuidance(Mixture(), label_likelihood(self.logits))
        result = guided.denoise(self.x_t, self.t, self.labels)
        expected = torch.cat(each, dim=1).gather(1, self.labels[:, None])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)

    def test_the_loss_is_least_at_the_exact_classifier(self):
        """Its gradient by a slope, an offset and a power of both vanishes, by quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        z, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
        # x_t given the label is normal, so one node serves for data and noise together
        labels = torch.arange(2).repeat_interleave(60)
        means = torch.tensor([0.7, -0.3]).double()[labels][:, None]
        t = torch.full((120,), 0.4, dtype=torch.float64)
        spread = ((0.6 * 0.4) ** 2 + 0.4**2) ** 0.5 / 0.4
        wrong = torch.zeros(3, dtype=torch.float64, requires_grad=True)

        def classifier(x_t, t):
            slope = torch.cat([wrong[0] * x_t, wrong[1] + wrong[2] * x_t**2], dim=1)
            return self.logits(x_t, t) + slope

        eps = (spread * z).repeat(2)[:, None]
        loss = classifier_loss(classifier, self.process, means, eps, t, labels)
        assert loss.shape == (120,)
        (gradient,) = torch.autograd.grad((loss * w.repeat(2)).sum() / 2, wrong)
        assert gradient.abs().max() < 1e-8  # which is what 60 nodes leave
        biased = classifier_loss(
            lambda x, t: 2 * self.logits(x, t), self.process, means, eps, t, labels
        )
        assert ((biased - loss) * w.repeat(2)).sum() > 0.01


@pytest.mark.parametrize("method", ["denoise", "velocity"])
def test_inference_mode_is_refused_with_what_to_do(method):
    t = torch.full((3,), 0.5, dtype=torch.float64)
    x_t = some_states(FlowProcess(), t)
    guided, plain = (
        ClassifierGuidance(Unconditional(FlowProcess()), bayes(FlowProcess()), scale)
        for scale in (1.0, 0.0)
    )
    with torch.inference_mode():
        getattr(plain, method)(x_t, t, COND)  # which needs no gradient
        with pytest.raises(UserError, match=r"inference_mode\(\) .* torch\.no_grad\(\)"):
            getattr(guided, method)(x_t, t, COND)


def test_an_interval_that_runs_backwards_is_refused():
    with pytest.raises(ValueError, match=r"\(0.8, 0.2\): give the earlier time"):
        ClassifierGuidance(Unconditional(FlowProcess()), bayes(FlowProcess()), 1.0, (0.8, 0.2))
