"""The same floors without sampling: what is quadratic in data and noise needs four points."""

import pytest
import torch
from exact_gaussian import Gaussian, four_points, hermite

from ldm_core.diffusion.timesteps import logit_normal
from ldm_core.objectives.flow_matching import contrastive_flow_matching_loss, flow_matching_loss

EXACT = Gaussian()
X0, EPS = four_points()
GRID = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def expected_loss(t, network=EXACT.velocity):
    """(n,) for n times."""
    points = len(X0)
    x0, eps = X0.repeat(len(t), 1), EPS.repeat(len(t), 1)
    losses = flow_matching_loss(network, x0, eps, t.repeat_interleave(points), None)
    return losses.view(-1, points).mean(dim=1)


def test_floor():
    variance = (1 - GRID) ** 2 * EXACT.std**2 + GRID**2
    torch.testing.assert_close(expected_loss(GRID), EXACT.std**2 / variance, rtol=1e-12, atol=0)
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    known = torch.tensor([1.12360, 0.55172, 0.24752], dtype=torch.float64)
    torch.testing.assert_close(expected_loss(at), known, rtol=0, atol=5e-6)


def test_floor_over_logit_normal_times():
    nodes, weights = hermite(80)
    t = logit_normal(torch.special.ndtr(nodes).clamp(1e-300, 1 - 1e-16))
    assert (weights * expected_loss(t)).sum().item() == pytest.approx(0.61546, abs=5e-6)


def test_no_velocity_has_a_lower_loss():
    for wrong in (
        lambda x, t, c: EXACT.velocity(x, t) + 0.01,
        lambda x, t, c: EXACT.velocity(x, t) * 1.01,
        lambda x, t, c: EXACT.velocity(x, t) + 0.01 * (t[:, None] - x),
    ):
        assert (expected_loss(GRID, wrong) > expected_loss(GRID)).all()


def contrastive(network, t, weight):
    """Every pair of the four points: one to learn from and one to be contrasted with."""
    rows = torch.arange(4)
    x0, eps = X0.repeat_interleave(4, 0), EPS.repeat_interleave(4, 0)
    other = 4 * rows.repeat(4)  # the first row of each point
    times = torch.full((16,), t, dtype=torch.float64)
    return contrastive_flow_matching_loss(network, x0, eps, times, None, other, weight)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_minimiser_of_the_contrastive_loss(t):
    """(v* - w E[v']) / (1 - w) with E[v'] = -m: no gradient by an offset nor by a slope."""
    weight = 0.05
    offset = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def best(x, time, cond):
        v = (EXACT.velocity(x, time) + weight * EXACT.mean) / (1 - weight)
        return v + offset[0] + offset[1] * x

    (gradient,) = torch.autograd.grad(contrastive(best, t, weight).mean(), offset)
    assert gradient.abs().max() < 1e-14

    def plain(x, time, cond):
        return EXACT.velocity(x, time) + offset[0] + offset[1] * x

    (gradient,) = torch.autograd.grad(contrastive(plain, t, weight).mean(), offset)
    assert gradient.abs().max() > 1e-3


def test_without_contrast_it_is_flow_matching():
    losses = contrastive(EXACT.velocity, 0.5, 0.0)
    assert losses.shape == (16,)
    expected = expected_loss(torch.tensor([0.5], dtype=torch.float64))
    torch.testing.assert_close(losses.mean(), expected[0])
