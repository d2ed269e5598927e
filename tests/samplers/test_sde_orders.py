"""Weak order: how fast the standard deviation of the result nears that of the marginal."""

from functools import partial
from itertools import count

import pytest
import torch
from analytic import order
from gaussian_probe import PROCESSES, gaussian, marginal, probe, probe_path

from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.diffusion.process import squared_diffusion
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama

STEPS = (40, 80, 160)
SMOOTH = ("flow", "trig", "vp sde", "ve")  # of a table, slopes jump at its rows


def times(process, steps):
    return log_snr_grid(process, steps, first=-3.0, last=3.0, to_data=False)


def std_by_noise(sample, process, steps, draws=1):
    grid = times(process, steps)
    start = marginal(process, grid[0])
    return probe(sample, gaussian(process), grid, start, draws * steps)[1]


def std_by_path(sample, process, steps):
    grid = times(process, steps)
    return probe_path(sample, gaussian(process), grid, marginal(process, grid[0]))[1]


def weak_order(std, sample, process):
    exact = marginal(process, times(process, 1)[-1])[1]
    return order([abs(std(sample, process, steps) - exact) for steps in STEPS])


def strength(eta):
    return lambda process, t: eta * squared_diffusion(process, t)


def reverse_sde(s):
    return s


ONE, HALF = {"eta": 1.0}, {"eta": 0.5}


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (sample_ddpm, 1),
        (partial(sample_ddpm, variance="fixed_large"), 1),
        (partial(sample_ddim_eta, eta=0.3), 1),
        (partial(sample_euler_ancestral, eta=0.0), 1),
        (partial(sample_euler_ancestral, **HALF), 1),
        (partial(sample_euler_ancestral, **ONE), 1),
        (partial(sample_dpmpp_2s_ancestral, **HALF), 2),
        (partial(sample_dpmpp_2s_ancestral, **ONE), 2),
        (partial(sample_er_sde, stages=1), 1),
        (partial(sample_er_sde, stages=2), 2),
        (partial(sample_er_sde, stages=3), 2),
        (partial(sample_er_sde, stages=2, scaler=reverse_sde), 2),
    ],
)
def test_order_with_a_draw_per_step(sample, expected):
    measured = weak_order(std_by_noise, sample, PROCESSES["flow"])
    assert measured == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(
    "sample",
    [
        partial(sample_dpmpp_2m_sde, **HALF),
        partial(sample_dpmpp_2m_sde, **ONE),
        partial(sample_dpmpp_2m_sde, eta=1.5),
        partial(sample_dpmpp_sde, **HALF),
        partial(sample_dpmpp_sde, **ONE),
    ],
)
def test_order_along_a_path(sample):
    measured = weak_order(std_by_path, sample, PROCESSES["flow"])
    assert measured == pytest.approx(2, abs=0.2)


def test_draws_that_forget_the_path_cost_an_order():
    """Mutation: the half and the whole step of DPM-Solver++ (SDE) draw independently."""

    def independent(denoiser, x_T, grid, cond, *, noise):
        k = count()
        return sample_dpmpp_sde(denoiser, x_T, grid, cond, path=lambda t, r: noise(next(k)))

    std = partial(std_by_noise, draws=2)
    measured = weak_order(std, independent, PROCESSES["flow"])
    assert measured == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_order_of_euler_maruyama(name, eta):
    sample = partial(sample_euler_maruyama, diffusion=strength(eta))
    measured = weak_order(std_by_noise, sample, PROCESSES[name])
    assert measured == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", SMOOTH)
def test_order_of_churn(name):
    """Two for the ODE's steps; noise of any amount is added exactly."""
    measured = weak_order(std_by_noise, partial(sample_churn, churn=2.0), PROCESSES[name])
    assert measured == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("std", "samples"),
    [
        (std_by_noise, [partial(sample_euler_ancestral, eta=eta) for eta in (0.0, 0.5, 1.0)]),
        (
            std_by_noise,
            [partial(sample_euler_maruyama, diffusion=strength(eta)) for eta in (0.0, 0.5, 1.0)],
        ),
        (
            std_by_noise,
            [
                partial(sample_er_sde, stages=1, scaler=scaler)
                for scaler in (torch.ones_like, torch.sqrt, reverse_sde)
            ],
        ),
        (std_by_path, [partial(sample_dpmpp_2m_sde, eta=eta) for eta in (0.0, 0.5, 1.0)]),
        (std_by_path, [partial(sample_dpmpp_sde, eta=eta) for eta in (0.0, 0.5, 1.0)]),
    ],
    ids=["ancestral", "euler maruyama", "er sde", "2m sde", "sde"],
)
def test_the_limit_does_not_depend_on_eta(std, samples):
    """The two finest results, extrapolated to no step size as order 1 has it."""
    process = PROCESSES["flow"]
    exact = marginal(process, times(process, 1)[-1])[1]
    for sample in samples:
        coarse, fine = std(sample, process, 100), std(sample, process, 200)
        assert 2 * fine - coarse == pytest.approx(exact, abs=2e-4)
