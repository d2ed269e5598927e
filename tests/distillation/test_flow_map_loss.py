from functools import partial

import pytest
import torch
from analytic import caption, gaussian_average_velocity, gaussian_velocity, order
from exact_gaussian import Gaussian

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.flow_map import FlowMap
from ldm_core.distillation.flow_map import (
    central_derivative,
    exact_derivative,
    flow_map_loss,
    flow_map_target,
)

COND = caption(0.7, batch=64)
GENERATOR = torch.Generator().manual_seed(0)
X_T = torch.randn(64, 3, dtype=torch.float64, generator=GENERATOR)
T = torch.empty(64, dtype=torch.float64).uniform_(0.3, 0.95, generator=GENERATOR)
R = T * torch.empty(64, dtype=torch.float64).uniform_(0.1, 0.8, generator=GENERATOR)
V = gaussian_velocity(X_T, T, COND)


def without_velocity(student, x_t, t, r, v, cond):
    return exact_derivative(student, x_t, t, r, torch.zeros_like(v), cond)


def test_the_exact_map_satisfies_the_identity():
    u = gaussian_average_velocity(X_T, T, R, COND)
    target = flow_map_target(gaussian_average_velocity, X_T, T, R, V, COND)
    torch.testing.assert_close(target, u, rtol=0, atol=1e-13)
    loss = flow_map_loss(gaussian_average_velocity, gaussian_velocity, X_T, T, R, COND)
    assert loss.shape == (64,)
    assert loss.max() < 1e-24


def test_a_tangent_without_the_velocity_is_caught():
    loss = flow_map_loss(
        gaussian_average_velocity, gaussian_velocity, X_T, T, R, COND, without_velocity
    )
    assert loss.mean() > 1e-3
    target = flow_map_target(gaussian_average_velocity, X_T, T, R, V, COND, without_velocity)
    assert (target - gaussian_average_velocity(X_T, T, R, COND)).abs().max() > 0.1


def test_one_samples_velocity_is_right_on_average_given_the_state():
    """Without a teacher v = eps - x0; two draws of it have the mean and variance of all."""
    u = gaussian_average_velocity(X_T, T, R, COND)
    residuals = []
    for x0, eps in Gaussian().posterior(X_T, T):
        target = flow_map_target(gaussian_average_velocity, X_T, T, R, eps - x0, COND)
        residuals.append(target - u)
    assert residuals[0].abs().mean() > 0.1
    torch.testing.assert_close(residuals[0], -residuals[1], rtol=0, atol=1e-12)


def test_central_differences_converge_quadratically():
    exact = exact_derivative(gaussian_average_velocity, X_T, T, R, V, COND)
    errors = []
    for step in (4e-3, 2e-3, 1e-3):
        by_difference = central_derivative(gaussian_average_velocity, X_T, T, R, V, COND, step=step)
        errors.append(float((by_difference - exact).abs().max()))
    assert order(errors) == pytest.approx(2.0, abs=0.15)
    assert errors[-1] < 1e-4


def test_central_differences_stay_where_the_student_was_trained():
    seen = []

    def student(x_t, t, r, cond):
        seen.append((t, r))
        return x_t

    t = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    r = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    x = torch.ones(3, 2, dtype=torch.float64)
    derivative = central_derivative(student, x, t, r, 2 * x, None)
    for time, end in seen:
        assert (time <= 1).all()
        assert (time >= end).all()
    torch.testing.assert_close(derivative[1:], 2 * x[1:])  # du/dt of u = x_t is v
    assert torch.equal(derivative[0], torch.zeros(2, dtype=torch.float64))


def test_at_equal_times_the_target_is_the_velocity():
    loss = flow_map_loss(
        lambda x_t, t, r, cond: gaussian_velocity(x_t, t, cond), gaussian_velocity,
        X_T, T, T, COND,
    )  # fmt: skip
    assert torch.equal(loss, torch.zeros_like(loss))


def test_adaptive_weight():
    def student(x_t, t, r, cond):
        return gaussian_average_velocity(x_t, t, r, cond) + 0.1 * x_t

    arguments = (student, gaussian_velocity, X_T, T, R, COND)
    plain = flow_map_loss(*arguments)
    weighted = flow_map_loss(*arguments, weight_power=0.5, weight_offset=1e-2)
    torch.testing.assert_close(weighted, plain / (plain + 1e-2).sqrt())


def test_on_a_transformer_both_derivatives_agree_and_train():
    torch.manual_seed(0)
    config = DiTConfig(
        in_channels=2, latent_size=(4, 4), patch_size=2, width=16, depth=2, heads=2,
        text_width=5, pooled_width=3, flow_map=True,
    )  # fmt: skip
    network = DiT(config).double()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    cond = TextCondition(
        torch.randn(3, 2, 5), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(), torch.randn(3, 3)
    ).to(dtype=torch.float64)
    x_t = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    t, r = torch.tensor([[0.9, 0.5, 0.6], [0.2, 0.1, 0.5]], dtype=torch.float64)
    v, student = torch.randn_like(x_t), FlowMap(network)
    exact = exact_derivative(student, x_t, t, r, v, cond)
    by_difference = central_derivative(student, x_t, t, r, v, cond, step=1e-4)
    torch.testing.assert_close(by_difference, exact, rtol=1e-4, atol=1e-4)
    for derivative in (exact_derivative, partial(central_derivative, step=1e-2)):
        network.zero_grad()
        tracked = v.clone().requires_grad_()
        target = flow_map_target(student, x_t, t, r, tracked, cond, derivative)
        assert not target.requires_grad
        loss = flow_map_loss(student, lambda *_: v, x_t, t, r, cond, derivative)
        loss.mean().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
