import pytest
import torch
from analytic import caption, gaussian_average_velocity, gaussian_map, gaussian_velocity, order

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.distillation.trajectory import (
    average_teacher_velocity,
    euler_slope,
    heun_slope,
    trajectory_loss,
)
from ldm_core.samplers.euler import sample_euler

COND = caption(0.7, batch=6)
X_T = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.tensor([1.0, 0.9, 0.8, 0.5, 0.3, 1.0], dtype=torch.float64)
R = torch.tensor([0.0, 0.3, 0.1, 0.4, 0.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(("slope", "expected"), [(euler_slope, 1.0), (heun_slope, 2.0)])
def test_rollout_converges_to_the_exact_map(slope, expected):
    exact = gaussian_map(X_T, T, R, COND)

    def error(substeps):
        u = average_teacher_velocity(gaussian_velocity, X_T, T, R, COND, substeps, slope)
        return float((X_T - (T - R)[:, None] * u - exact).abs().max())

    errors = [error(n) for n in (40, 80, 160)]
    assert order(errors) == pytest.approx(expected, abs=0.15)


def test_target_is_the_teachers_two_steps_for_any_network():
    def network(x_t, t, cond):
        return torch.sin(3 * x_t) + t[:, None]

    x_T = X_T[:1]
    grid = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    denoiser = Denoiser(network, FlowProcess(), Prediction.VELOCITY)
    two_steps = sample_euler(denoiser, x_T, grid, None)
    u = average_teacher_velocity(network, x_T, grid[:1], grid[2:], None, 2, euler_slope)
    torch.testing.assert_close(u, (x_T - two_steps) / 0.6, rtol=0, atol=1e-14)


def test_target_is_that_of_progressive_distillation():
    """x0 of Salimans & Ho 2022, Algorithm 2, for two DDIM steps of any network: on a straight line
    (z'' - (s''/s) z) / (a'' - (s''/s) a) = z - t u.
    """

    def network(x_t, t, cond):
        return torch.sin(3 * x_t) + t[:, None]

    z, t, r = X_T, T, R * 0.9
    middle = (t + r) / 2
    for start, end in ((t, middle), (middle, r)):  # DDIM by its own formula, from x0 and eps
        a, s, a_end, s_end = (level[:, None] for level in (1 - start, start, 1 - end, end))
        v = network(z, start, None)
        z = a_end * (z - s * v) + s_end * (z + a * v)
    ratio = (r / t)[:, None]
    x0 = (z - ratio * X_T) / ((1 - r)[:, None] - ratio * (1 - t)[:, None])
    u = average_teacher_velocity(network, X_T, t, r, None, 2, euler_slope)
    torch.testing.assert_close(X_T - t[:, None] * u, x0, rtol=0, atol=1e-13)


def test_loss_vanishes_for_the_exact_map_as_substeps_grow():
    losses = [
        float(
            trajectory_loss(
                gaussian_average_velocity, gaussian_velocity, X_T, T, R, COND, substeps=n
            ).max()
        )
        for n in (40, 80, 160)
    ]
    assert order(losses) == pytest.approx(4.0, abs=0.3)  # the square of order 2


def test_at_equal_times_the_target_is_the_velocity():
    u = average_teacher_velocity(gaussian_velocity, X_T, T, T, COND, 4)
    torch.testing.assert_close(u, gaussian_velocity(X_T, T, COND), rtol=0, atol=1e-14)
