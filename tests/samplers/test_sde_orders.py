"""Weak order: how fast the standard deviation of the result nears that of the marginal.

On flow, VP and VE. Most samplers know nothing but levels, so that equal steps of lambda are the
same to them on every process (see `test_sde_identities.py`), but for a Brownian path, which runs in
time; equal steps of time are another grid of levels on each.
"""

from functools import partial
from itertools import count

import pytest
import torch
from analytic import order
from covering import covering
from gaussian_probe import PROCESSES, gaussian, marginal, probe, probe_path

from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.diffusion.process import squared_diffusion
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama


def in_lambda(process, steps):
    return log_snr_grid(process, steps, first=-3.0, last=3.0, to_data=False)


def in_time(process, steps):
    first, last = log_snr_grid(process, 1, first=-1.0, last=1.0, to_data=False)
    return torch.linspace(first, last, steps + 1, dtype=torch.float64)


def std_by_noise(sample, process, grid, draws=1):
    start = marginal(process, grid[0])
    return probe(sample, gaussian(process), grid, start, draws * (len(grid) - 1))[1]


def std_by_path(sample, process, grid):
    return probe_path(sample, gaussian(process), grid, marginal(process, grid[0]))[1]


def weak_order(std, sample, name, grid_of, steps):
    process = PROCESSES[name]
    exact = marginal(process, grid_of(process, 1)[-1])[1]
    return order([abs(std(sample, process, grid_of(process, n)) - exact) for n in steps])


def strength(eta):
    return lambda process, t: eta * squared_diffusion(process, t)


def reverse_sde(s):
    return s


ONE, HALF = {"eta": 1.0}, {"eta": 0.5}
MANY, FEW = (40, 80, 160), (40, 80)  # equal steps of time are taken over fewer levels


def settings(*every):
    return {f"{name} {grid_of.__name__}": (name, grid_of, steps) for name, grid_of, steps in every}


EVERYWHERE = settings(
    ("flow", in_lambda, MANY),
    ("flow", in_time, FEW),
    ("vp sde", in_time, FEW),
    ("ve", in_time, FEW),
)
IN_LAMBDA = settings(("vp sde", in_lambda, FEW), ("ve", in_lambda, FEW))


A_DRAW_PER_STEP = {
    "ddpm": (sample_ddpm, 1),
    "ddpm large": (partial(sample_ddpm, variance="fixed_large"), 1),
    "ddim 0.3": (partial(sample_ddim_eta, eta=0.3), 1),
    "ancestral 0": (partial(sample_euler_ancestral, eta=0.0), 1),
    "ancestral 0.5": (partial(sample_euler_ancestral, **HALF), 1),
    "ancestral 1": (partial(sample_euler_ancestral, **ONE), 1),
    "2s ancestral 0.5": (partial(sample_dpmpp_2s_ancestral, **HALF), 2),
    "2s ancestral 1": (partial(sample_dpmpp_2s_ancestral, **ONE), 2),
    "er sde 1": (partial(sample_er_sde, stages=1), 1),
    "er sde 2": (partial(sample_er_sde, stages=2), 2),
    "er sde 3": (partial(sample_er_sde, stages=3), 2),
    "er sde 2 reverse": (partial(sample_er_sde, stages=2, scaler=reverse_sde), 2),
}


@pytest.mark.parametrize(("sampler", "setting"), covering(A_DRAW_PER_STEP, EVERYWHERE))
def test_order_with_a_draw_per_step(sampler, setting):
    sample, expected = sampler
    measured = weak_order(std_by_noise, sample, *setting)
    assert measured == pytest.approx(expected, abs=0.2)


BY_VELOCITY = {
    "euler maruyama 0.5": (partial(sample_euler_maruyama, diffusion=strength(0.5)), 1),
    "euler maruyama 1": (partial(sample_euler_maruyama, diffusion=strength(1.0)), 1),
    "churn": (partial(sample_churn, churn=2.0), 2),  # of the ODE: any noise is added exactly
}
ON_TRIG = settings(("trig", in_lambda, FEW))


@pytest.mark.parametrize(
    ("sampler", "setting"), covering(BY_VELOCITY, EVERYWHERE | IN_LAMBDA | ON_TRIG)
)
def test_order_of_steps_in_time(sampler, setting):
    """These follow velocities, hence the process's own time, whatever the grid."""
    sample, expected = sampler
    measured = weak_order(std_by_noise, sample, *setting)
    assert measured == pytest.approx(expected, abs=0.2)


ALONG_A_PATH = {
    "2m sde 0.5": partial(sample_dpmpp_2m_sde, **HALF),
    "sde 1": partial(sample_dpmpp_sde, **ONE),
    "2m sde 1": partial(sample_dpmpp_2m_sde, **ONE),
    "sde 0.5": partial(sample_dpmpp_sde, **HALF),
    "2m sde 1.5": partial(sample_dpmpp_2m_sde, eta=1.5),
}


@pytest.mark.parametrize(("sample", "setting"), covering(ALONG_A_PATH, EVERYWHERE | IN_LAMBDA))
def test_order_along_a_path(sample, setting):
    measured = weak_order(std_by_path, sample, *setting)
    assert measured == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("name", "grid_of", "steps"), [EVERYWHERE["flow in_lambda"], *IN_LAMBDA.values()]
)
def test_draws_that_forget_the_path_cost_an_order(name, grid_of, steps):
    """Mutation: the half and the whole step of DPM-Solver++ (SDE) draw independently."""

    def independent(denoiser, x_T, grid, cond, *, noise):
        k = count()
        return sample_dpmpp_sde(denoiser, x_T, grid, cond, path=lambda t, r: noise(next(k)))

    std = partial(std_by_noise, draws=2)
    measured = weak_order(std, independent, name, grid_of, steps)
    assert measured == pytest.approx(1, abs=0.2)
