import pytest
import torch
from analytic import STD, caption, gaussian_denoiser

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.guidance.guided import Linear
from ldm_core.samplers.heun import sample_heun

GRID = linear_grid(400, dtype=torch.float64)
PROBE = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # an affine sampler's mean and std


def sampled_moments(denoiser, cond):
    zero, one = sample_heun(denoiser, PROBE, GRID, cond.expand(2)).flatten().tolist()
    return zero, one - zero


class Counting:
    """Counts passes and the samples in them."""

    def __init__(self):
        self.inner, self.batches = gaussian_denoiser(), []
        self.process = self.inner.process

    def denoise(self, x_t, t, cond):
        self.batches.append(len(x_t))
        return self.inner.denoise(x_t, t, cond)

    def velocity(self, x_t, t, cond):
        self.batches.append(len(x_t))
        return self.inner.velocity(x_t, t, cond)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_equal_widths_move_the_mean_only(scale):
    guided = ClassifierFreeGuidance(gaussian_denoiser(), scale, caption(-0.2))
    mean, std = sampled_moments(guided, caption(0.7))
    assert mean == pytest.approx(-0.2 + scale * 0.9, abs=2e-4)
    assert std == pytest.approx(STD, abs=2e-4)


def test_unequal_widths_do_not_sample_the_tilted_density():
    # Under guidance x_t scales as V_c^(w/2) V_u^((1-w)/2), with V_t = alpha^2 S^2 + sigma^2.
    guided = ClassifierFreeGuidance(gaussian_denoiser(), 3.0, caption(0.0, 1.0))
    _, std = sampled_moments(guided, caption(0.0, 0.3))
    assert std == pytest.approx(0.3**3, abs=2e-4)


def test_interval_guides_only_inside():
    low, high = 0.2, 0.6
    guided = ClassifierFreeGuidance(gaussian_denoiser(), 3.0, caption(0.0, 1.0), (low, high))
    _, std = sampled_moments(guided, caption(0.0, 0.3))

    def growth(s, t, r):
        return (((1 - t) ** 2 * s**2 + t**2) / ((1 - r) ** 2 * s**2 + r**2)) ** 0.5

    inside = growth(0.3, low, high) ** 3 * growth(1.0, low, high) ** -2
    expected = growth(0.3, 0.0, low) * inside * growth(0.3, high, 1.0)
    assert std == pytest.approx(expected, rel=0.02)  # the interval's ends cost Heun an order


@pytest.mark.parametrize("method", ["denoise", "velocity"])
@pytest.mark.parametrize(
    ("scale", "t", "batches"),
    [(1.0, 0.5, [3]), (2.0, 0.9, [3]), (2.0, 0.5, [6]), (torch.ones(3), 0.5, [3])],
    ids=["scale 1", "outside", "inside", "scales 1"],
)
def test_a_pass_is_paid_only_where_guided(method, scale, t, batches):
    inner, cond = Counting(), caption(0.7, batch=3)
    x_t = torch.randn(3, 2, dtype=torch.float64)
    guided = ClassifierFreeGuidance(inner, scale, caption(-0.2), (0.2, 0.8))
    result = getattr(guided, method)(x_t, t, cond)
    assert inner.batches == batches
    if batches == [3]:
        assert torch.equal(result, getattr(inner.inner, method)(x_t, t, cond))


def test_scales_and_times_of_their_own():
    inner, cond, null = gaussian_denoiser(), caption(0.7, batch=4), caption(-0.2)
    x_t = torch.randn(4, 2, dtype=torch.float64)
    scale = torch.tensor([0.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    t = torch.tensor([0.3, 0.3, 0.3, 0.9], dtype=torch.float64)
    result = ClassifierFreeGuidance(inner, scale, null, (0.0, 0.5)).denoise(x_t, t, cond)
    d_c, d_u = inner.denoise(x_t, t, cond), inner.denoise(x_t, t, null.expand(4))
    expected = torch.stack([d_u[0], d_c[1], d_u[2] + 3 * (d_c[2] - d_u[2]), d_c[3]])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


def test_labels_are_guided_against_the_null_label():
    seen = []

    def network(x_t, t, labels):
        seen.append(labels.tolist())
        return labels[:, None].double().expand_as(x_t)

    denoiser = Denoiser(network, FlowProcess(), Prediction.X0)
    guided = ClassifierFreeGuidance(denoiser, 3.0, torch.tensor([10]))
    x0 = guided.denoise(torch.zeros(2, 3, dtype=torch.float64), 0.5, torch.tensor([4, 7]))
    assert seen == [[4, 7, 10, 10]]
    assert torch.equal(x0[:, 0], torch.tensor([10 + 3.0 * (4 - 10), 10 + 3.0 * (7 - 10)]).double())


@pytest.mark.parametrize("interval", [(0.8, 0.2), (0.2, float("nan"))])
def test_an_interval_that_no_time_lies_in_is_refused(interval):
    with pytest.raises(ValueError, match="no time lies in the interval .* first"):
        ClassifierFreeGuidance(gaussian_denoiser(), 3.0, caption(0.0), interval)


@pytest.mark.parametrize(("t", "passes"), [(0.25, 6), (0.75, 6), (0.2499, 3), (0.7501, 3)])
def test_both_ends_of_an_interval_are_in_it(t, passes):
    inner = Counting()
    guided = ClassifierFreeGuidance(inner, 3.0, caption(-0.2), (0.25, 0.75))
    guided.denoise(torch.randn(3, 2, dtype=torch.float64), t, caption(0.7, batch=3))
    assert inner.batches == [passes]


def test_the_plain_rule_is_a_line_through_both():
    good, bad = torch.randn(2, 3, 2, dtype=torch.float64)
    for scale, expected in ((0.0, bad), (1.0, good), (3.0, 3 * good - 2 * bad)):
        found = Linear()(good, bad, torch.tensor(scale), torch.tensor(0.5))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
