"""Moments that are known in closed form, or exact whatever the number of steps."""

from functools import partial

import pytest
import torch
from gaussian_probe import MEAN, PROCESSES, STD, gaussian, marginal, probe, probe_path

from ldm_core.diffusion.grids import linear_grid, log_snr_grid, table_grid
from ldm_core.diffusion.process import over_dimensions
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.consistency import sample_consistency
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.er_sde import sample_er_sde

TABLE = PROCESSES["linear"]
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def table_moments(sample, steps, mean, std, draws=None):
    """From N(0, 1) over that many rows of the table."""
    return probe(sample, gaussian(TABLE, mean, std), table_grid(TABLE, steps), (0, 1), draws)


def ddim(denoiser, x_T, grid, cond, *, noise):
    return sample_ddim_eta(
        denoiser, x_T, grid, cond, noise=lambda k: torch.zeros_like(x_T), eta=0.0
    )


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 250])
def test_fixed_large_is_exact_for_unit_normal_data(steps):
    noisy = partial(sample_ddpm, variance="fixed_large", noisy_end=True)
    assert table_moments(noisy, steps, 0.0, 1.0) == (0, pytest.approx(1, abs=1e-12))


@each_process
def test_fixed_large_is_exact_on_the_circle_alone(process):
    """Where alpha^2 + sigma^2 = 1, so that N(0, 1) stays itself: not on a flow and not on VE."""
    grid = log_snr_grid(process, 7, first=-2.0, last=1.5, to_data=False)
    start, expected = (marginal(process, t, 0.0, 1.0) for t in (grid[0], grid[-1]))
    noisy = partial(sample_ddpm, variance="fixed_large")
    mean, std = probe(noisy, gaussian(process, 0.0, 1.0), grid, start)
    assert mean == pytest.approx(0, abs=1e-12)
    exact = std == pytest.approx(expected[1], abs=1e-12)
    assert exact == (expected[1] == pytest.approx(1, abs=1e-9))


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_fixed_large_without_the_last_draw(steps):
    """Exact above the data still; the last step returns the estimate, alpha_t x_t."""
    sample, unit = partial(sample_ddpm, variance="fixed_large"), gaussian(TABLE, 0.0, 1.0)
    grid = table_grid(TABLE, steps + 1)
    assert probe(sample, unit, grid[:-1], (0, 1)) == (0, pytest.approx(1, abs=1e-12))
    last = float(TABLE.alpha(grid[-2]))
    assert probe(sample, unit, grid, (0, 1)) == (0, pytest.approx(last, abs=1e-12))


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_fixed_small_is_exact_for_a_point_mass(steps):
    mean, std = table_moments(sample_ddpm, steps, 0.5, 0.0)
    assert mean == pytest.approx(0.5, abs=1e-12)
    assert std < 1e-8


def test_fixed_small_is_too_small_for_unit_normal_data():
    assert table_moments(sample_ddpm, 10, 0.0, 1.0)[1] == pytest.approx(0.7405, abs=5e-5)


@pytest.mark.parametrize(("steps", "expected"), [(10, 0.1846), (50, 0.2733), (250, 0.2944)])
def test_ddim_of_a_narrow_gaussian(steps, expected):
    """Figures of diffusers' DDIMScheduler for N(0.5, 0.3^2), trailing, data at t = 0."""
    assert table_moments(ddim, steps, 0.5, 0.3, draws=0)[1] == pytest.approx(expected, abs=5e-5)


def test_starting_at_unit_noise_moves_the_mean():
    """DDIM over every row: m (1 - a S / sqrt(a^2 S^2 + s^2)), where a = alpha_T is not quite 0."""
    mean, std = table_moments(ddim, 1000, 0.5, 0.3, draws=0)
    assert std == pytest.approx(0.2985, abs=5e-5)
    a = float(TABLE.alpha(torch.ones((), dtype=torch.float64)))
    expected = 0.5 * (1 - a * 0.3 / (a**2 * 0.3**2 + 1 - a**2) ** 0.5)
    assert mean == pytest.approx(expected, abs=1e-5)


BY_NOISE = [
    sample_ddpm,
    partial(sample_ddim_eta, eta=0.4),
    sample_euler_ancestral,
    partial(sample_dpmpp_2s_ancestral, eta=0.4),
    partial(sample_er_sde, stages=1),
    partial(sample_er_sde, stages=3),
    sample_consistency,
]
BY_PATH = [
    sample_dpmpp_2m_sde,
    partial(sample_dpmpp_2m_sde, eta=0.4),
    sample_dpmpp_sde,
    partial(sample_dpmpp_sde, eta=0.4),
]


@each_process
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_marginals_of_a_point_mass_are_exact(process, steps):
    """On the way to the data, where a point mass is alpha_r m + sigma_r z."""
    grid = log_snr_grid(process, steps, first=-2.0, last=1.5, to_data=False)
    start, expected = (marginal(process, t, 0.7, 0.0) for t in (grid[0], grid[-1]))
    point = gaussian(process, 0.7, 0.0)
    for sample in BY_NOISE:
        assert probe(sample, point, grid, start) == pytest.approx(expected, abs=1e-12)
    for sample in BY_PATH:
        assert probe_path(sample, point, grid, start) == pytest.approx(expected, abs=1e-12)


class ExactConsistency:
    """f(x, t) = m + S (x - alpha m) / sqrt(V_t), the end of the ODE on N(m, S^2)."""

    def __init__(self, process):
        self.process = process

    def denoise(self, x_t, t, cond):
        t = over_dimensions(torch.as_tensor(t), x_t)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return MEAN + STD * (x_t - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()

    def velocity(self, x_t, t, cond):
        raise AssertionError("a consistency function has no velocity")


@each_process
@pytest.mark.parametrize("steps", [1, 4])
def test_an_exact_consistency_function_returns_the_data(process, steps):
    grid = linear_grid(steps, dtype=torch.float64) * process.end
    start = marginal(process, grid[0])
    moments = probe(sample_consistency, ExactConsistency(process), grid, start)
    assert moments == pytest.approx((MEAN, STD), abs=1e-14)


@each_process
def test_a_denoiser_is_not_a_consistency_function(process):
    """Mutation: E[x0 | x_t] for f shrinks the data."""
    grid = linear_grid(4, dtype=torch.float64) * process.end
    start = marginal(process, grid[0])
    assert probe(sample_consistency, gaussian(process), grid, start)[1] < 0.9 * STD
