"""One solver under many names, one trajectory under many processes and predictions."""

import math
from itertools import pairwise

import pytest
import torch
from analytic import Mixture
from solvers import ALL, EXPONENTIAL

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, add_noise, half_log_snr
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import (
    VPSDE,
    DiscreteVP,
    TrigFlow,
    scaled_linear_betas,
    zero_terminal_snr,
)
from ldm_core.samplers.ddim import sample_ddim
from ldm_core.samplers.euler import sample_euler

PROCESSES = {
    "flow": FlowProcess(),
    "trig": TrigFlow(),
    "vp sde": VPSDE(),
    "table": DiscreteVP(scaled_linear_betas()),
    "zero terminal": DiscreteVP(zero_terminal_snr(scaled_linear_betas())),
    "ve": VarianceExploding(),
}
FIRST, LAST = -2.5, 3.2  # levels that all of them have
X = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
each_exponential = pytest.mark.parametrize("name", EXPONENTIAL)


def sampled(sample, process, steps=12, to_data=False):
    """Result over alpha, from starts that are X over alpha."""
    grid = log_snr_grid(process, steps, FIRST, LAST, to_data)
    x_T = process.alpha(grid[0]) * X
    return sample(Mixture(process).denoiser(), x_T, grid, None) / process.alpha(grid[-1])


def by_hand(process, steps=12):
    """DPM-Solver++(1) as printed: sigma_r / sigma_t x - alpha_r (e^-h - 1) D."""
    grid = log_snr_grid(process, steps, FIRST, LAST, to_data=False)
    x = process.alpha(grid[0]) * X
    for t, r in pairwise(grid):
        h = half_log_snr(process, r) - half_log_snr(process, t)
        x0 = Mixture(process).denoiser().denoise(x, t, None)
        x = process.sigma(r) / process.sigma(t) * x - process.alpha(r) * torch.expm1(-h) * x0
    return x / process.alpha(grid[-1])


def test_first_order_solvers_are_one():
    flow, ve = FlowProcess(), VarianceExploding()
    expected = sampled(sample_ddim, flow)
    for result in (
        sampled(sample_euler, flow),
        sampled(sample_euler, ve),
        sampled(sample_ddim, ve),
        by_hand(flow),
        by_hand(ve),
        sampled(sample_ddim, VPSDE()),
    ):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


def test_euler_is_not_ddim_where_paths_of_a_point_are_curved():
    difference = sampled(sample_euler, TrigFlow()) - sampled(sample_ddim, TrigFlow())
    assert difference.abs().max() > 1e-3


@each_exponential
@pytest.mark.parametrize("to_data", [False, True])
def test_every_process_takes_the_same_path(name, to_data):
    expected = sampled(EXPONENTIAL[name], FlowProcess(), 6, to_data)
    for process in PROCESSES.values():
        result = sampled(EXPONENTIAL[name], process, 6, to_data)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("process", [FlowProcess(), VPSDE()], ids=["flow", "vp sde"])
@pytest.mark.parametrize("name", ALL)
def test_predictions_do_not_change_the_path(name, process):
    mixture = Mixture(process)
    grid = torch.linspace(0.98, 0.02, 6, dtype=torch.float64)
    expected = ALL[name](mixture.denoiser(), X, grid, None)
    for prediction in Prediction:
        result = ALL[name](mixture.denoiser(prediction), X, grid, None)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def point_mass(process, name, steps, last, believed=None):
    """What is reached at `last`, what is exact there, and the point that the data is.

    The solver takes the levels of the process that it believes in, by default the true one.
    """
    point, eps = torch.randn(2, 3, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x_t, t, cond: point, believed or process, Prediction.X0)
    grid = process.end * torch.linspace(1, last, steps + 1, dtype=torch.float64)
    x_T = add_noise(process, point, eps, grid[0])
    result = ALL[name](denoiser, x_T, grid, None)
    return result, add_noise(process, point, eps, grid[-1]), point


STRAIGHT = ("flow", "ve")  # in t, so that velocity samplers are exact on the way, too


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ALL)
def test_a_point_mass_is_followed_exactly(process, name):
    everywhere = name in EXPONENTIAL or process in STRAIGHT
    for steps in (1, 2, 7):
        for last in (0.0, 0.3) if everywhere else (0.0,):
            result, exact, _ = point_mass(PROCESSES[process], name, steps, last)
            torch.testing.assert_close(result, exact, rtol=0, atol=1e-12)


def test_levels_of_another_process_miss_it():
    result, exact, _ = point_mass(FlowProcess(), "DPM++ 2M", 7, 0.3, believed=VPSDE())
    assert (result - exact).abs().max() > 0.01


def test_a_grid_that_stops_short_misses_the_data():
    result, exact, point = point_mass(FlowProcess(), "DPM++ 2M", 7, 0.01)
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-12)
    assert (result - point).abs().max() > 1e-4


@each_exponential
def test_a_time_rounded_past_the_end_is_pure_noise(name):
    """pi / 2 in float32 is above pi / 2, where the cosine is below 0."""
    grid = torch.linspace(math.pi / 2, 0, 9)
    assert TrigFlow().alpha(grid[0].double()) < 0
    exact = torch.linspace(math.pi / 2, 0, 9, dtype=torch.float64)
    denoiser = Mixture(TrigFlow()).denoiser()
    result, expected = (EXPONENTIAL[name](denoiser, X, g, None) for g in (grid, exact))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_all_of_them_start_from_pure_noise():
    grid = torch.linspace(1, 0, 41, dtype=torch.float64)
    exact = torch.from_numpy(Mixture().flow_map(X[:, 0].numpy(), 1.0, 0.0))
    for sample in ALL.values():
        error = (sample(Mixture().denoiser(), X, grid, None)[:, 0] - exact).abs().max()
        assert math.isfinite(error)
        assert error < 0.2
