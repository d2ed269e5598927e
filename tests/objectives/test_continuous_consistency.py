import math

import pytest
import torch
from analytic import order
from exact_gaussian import Gaussian

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.process import over_dimensions
from ldm_core.diffusion.variance_preserving import TrigFlow
from ldm_core.distillation.consistency import consistency_distillation_loss
from ldm_core.objectives.continuous_consistency import (
    consistency_tangent,
    continuous_consistency_loss,
    normalised_tangent,
)
from ldm_core.objectives.regression import mean_square

EXACT = Gaussian(TrigFlow())
X_T = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.05, 1.52, 24, dtype=torch.float64)
V = EXACT.velocity(X_T, T)


def exact_network(x_t, t, cond=None):
    """F = (cos t x_t - f) / sin t."""
    cos, sin = over_dimensions(t.cos(), x_t), over_dimensions(t.sin(), x_t)
    return (cos * x_t - EXACT.consistency(x_t, t)) / sin


def rough(x_t, t, cond=None):
    return torch.sin(2 * x_t + over_dimensions(t, x_t)) + 0.3 * over_dimensions(t, x_t) ** 2


def leads_to(network):
    """f of a network."""

    def f(x_t, t, cond=None):
        cos, sin = over_dimensions(t.cos(), x_t), over_dimensions(t.sin(), x_t)
        return cos * x_t - sin * network(x_t, t)

    return f


def test_the_tangent_vanishes_for_the_exact_network():
    value, tangent = consistency_tangent(exact_network, X_T, T, V, None)
    assert tangent.abs().max() < 1e-13
    torch.testing.assert_close(value, exact_network(X_T, T), rtol=0, atol=0)


def test_the_tangent_is_the_change_of_f_along_the_ode():
    _, tangent = consistency_tangent(rough, X_T, T, V, None)
    _, slope = torch.func.jvp(leads_to(rough), (X_T, T), (V, torch.ones_like(T)))
    torch.testing.assert_close(tangent, T.cos()[:, None] * slope, rtol=1e-12, atol=1e-13)
    assert tangent.abs().mean() > 0.1


def test_warming_up_leaves_the_derivative_out():
    _, tangent = consistency_tangent(rough, X_T, T, V, None, warmup=0.0)
    expected = -T.cos().square()[:, None] * (rough(X_T, T) - V)
    torch.testing.assert_close(tangent, expected)
    _, half = consistency_tangent(rough, X_T, T, V, None, warmup=0.5)
    _, whole = consistency_tangent(rough, X_T, T, V, None, warmup=1.0)
    torch.testing.assert_close(half, (tangent + whole) / 2)
    # The exact network is no fixed point before the warm-up ends.
    assert consistency_tangent(exact_network, X_T, T, V, None, 0.5)[1].abs().max() > 0.1


def test_a_tangent_without_the_velocity_is_caught():
    _, tangent = consistency_tangent(exact_network, X_T, T, torch.zeros_like(V), None)
    assert tangent.abs().mean() > 0.1


def test_normalised_tangents():
    g = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    g[0] = 0
    norms = g.flatten(1).norm(dim=1)
    result = normalised_tangent(g, 0.1).flatten(1).norm(dim=1)
    torch.testing.assert_close(result, norms / (norms + 0.1))


def test_the_gradient_follows_the_tangent():
    offset = torch.zeros_like(X_T).requires_grad_()
    loss = continuous_consistency_loss(lambda x, t, c: rough(x, t) + offset, X_T, T, V, None)
    (gradient,) = torch.autograd.grad(loss.sum(), offset)
    _, tangent = consistency_tangent(rough, X_T, T, V, None)
    torch.testing.assert_close(gradient, -2 / 3 * normalised_tangent(tangent))
    norms = tangent.norm(dim=1)
    torch.testing.assert_close(loss, (norms / (norms + 0.1)).square() / 3)


def test_it_is_the_limit_of_discrete_consistency():
    """The slope of the discrete loss over its step is -2 sin t df/dt / d = -2 tan t g / d."""
    _, tangent = consistency_tangent(rough, X_T, T, V, None)
    limit = -2 / 3 * T.tan()[:, None] * tangent
    errors = []
    for h in (0.02, 0.01, 0.005):
        offset = torch.zeros_like(X_T).requires_grad_()
        student = leads_to(lambda x, t, offset=offset: rough(x, t) + offset)
        loss = consistency_distillation_loss(
            student, leads_to(rough), EXACT.velocity, X_T, T, T - h, None, distance=mean_square
        )
        (gradient,) = torch.autograd.grad(loss.sum() / h, offset)
        errors.append(float((gradient - limit).abs().max()))
    assert order(errors) == pytest.approx(1.0, abs=0.1)


def trained(sign):
    """Mean and width of an f of the right form after descending the loss from a wrong start."""
    parameters = torch.tensor([0.0, 0.9], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([parameters], lr=0.2)
    t = torch.linspace(0.1, 1.5, 15, dtype=torch.float64).repeat_interleave(4)
    x_t = EXACT.flow_map(torch.tensor([[-1.5], [-0.4], [0.6], [1.6]]).double(), 1.5, 0.8)
    x_t = torch.cat([EXACT.flow_map(x_t, 0.8, r) for r in t[::4]])
    v = EXACT.velocity(x_t, t)

    def network(x, time, cond):
        a, s = time.cos()[:, None], time.sin()[:, None]
        mean, std = parameters
        end = mean + std * (x - a * mean) / (a**2 * std**2 + s**2).sqrt()
        return (a * x - end) / s

    for _ in range(200):
        optimizer.zero_grad()
        value, tangent = consistency_tangent(network, x_t, t, v, None)
        mean_square(network(x_t, t, None), value + sign * tangent).mean().backward()
        optimizer.step()
        if parameters.detach().abs().max() > 5:
            break
    return parameters.tolist()


def test_following_the_tangent_finds_the_distribution():
    assert trained(+1) == pytest.approx([EXACT.mean, EXACT.std], abs=1e-3)


def test_against_the_tangent_it_is_lost():
    assert math.dist(trained(-1), (EXACT.mean, EXACT.std)) > 0.5


def test_on_a_transformer():
    torch.manual_seed(0)
    network = DiT(
        DiTConfig(
            in_channels=2, latent_size=(4, 4), patch_size=2, width=16, depth=2, heads=2,
            text_width=5, pooled_width=3,
        )
    ).double()  # fmt: skip
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    cond = TextCondition(torch.randn(3, 2, 5), torch.ones(3, 2).bool(), torch.randn(3, 3)).to(
        dtype=torch.float64
    )
    x_t, v = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64)
    h = 1e-5
    _, tangent = consistency_tangent(network, x_t, t, v, cond)

    def f(x, time):
        cos, sin = over_dimensions(time.cos(), x), over_dimensions(time.sin(), x)
        return cos * x - sin * network(x, time, cond)

    with torch.no_grad():
        slope = (f(x_t + h * v, t + h) - f(x_t - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(tangent, over_dimensions(t.cos(), x_t) * slope, rtol=1e-6, atol=1e-7)
    continuous_consistency_loss(network, x_t, t, v, cond).mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
