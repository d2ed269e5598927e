"""The multistep solvers beside diffusers' schedulers, whose tables are in float32.

Where the two can only be right together they agree; where diffusers' third order is of order 2,
ours agrees with it once it is broken in the same way.
"""

from functools import partial

import pytest
import torch
from analytic import Mixture

from ldm_core.diffusion.variance_preserving import DiscreteVP, scaled_linear_betas
from ldm_core.samplers import exponential
from ldm_core.samplers.ddim import sample_ddim
from ldm_core.samplers.deis import sample_deis
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m, sample_dpmpp_3m
from ldm_core.samplers.exponential import bh1, bh2, moments
from ldm_core.samplers.unipc import sample_unipc

diffusers = pytest.importorskip("diffusers")
from diffusers import (  # noqa: E402
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)

X = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
TABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
dpm = partial(DPMSolverMultistepScheduler, prediction_type="sample")
unipc = partial(UniPCMultistepScheduler, prediction_type="sample")
deis = partial(DEISMultistepScheduler, prediction_type="sample")


def theirs(scheduler, mixture, grid):
    x = X
    for t, row in zip(grid[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(mixture.x0(x, t, None), row, x).prev_sample
    return x


def on_a_flow(make, grid, **config):
    """Their solver on a grid of ours, which they do not take as an argument."""
    scheduler = make(use_flow_sigmas=True, lower_order_final=False, **config)
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas, scheduler.timesteps = grid.float(), torch.arange(len(grid) - 1)
    return theirs(scheduler, Mixture(), grid)


def assert_close(ours, other):
    torch.testing.assert_close(ours, other.double(), rtol=1e-5, atol=1e-5)


INNER = {"final_sigmas_type": "sigma_min"}
FLOW_CASES = {
    "1M": (dpm, {"solver_order": 1} | INNER, sample_ddim),
    "2M midpoint": (dpm, INNER, sample_dpmpp_2m),
    "2M heun": (dpm, {"solver_type": "heun"} | INNER, partial(sample_dpmpp_2m, step_function=None)),
    "UniPC-1": (unipc, {"solver_order": 1} | INNER, partial(sample_unipc, order=1)),
    "UniPC-2 bh1": (
        unipc,
        {"solver_type": "bh1"} | INNER,
        partial(sample_unipc, step_function=bh1),
    ),
    "UniPC-2 bh2": (
        unipc,
        {"solver_type": "bh2"} | INNER,
        partial(sample_unipc, step_function=bh2),
    ),
    "UniPC-3": (unipc, {"solver_order": 3} | INNER, partial(sample_unipc, order=3)),
    "UniPC-3 predictor": (
        unipc,
        {"solver_order": 3, "disable_corrector": list(range(99))} | INNER,
        partial(sample_unipc, order=3, corrector=False),
    ),
    "DEIS-2": (deis, {"solver_order": 2}, partial(sample_deis, order=2)),
    "DEIS-3": (deis, {"solver_order": 3}, sample_deis),
}


@pytest.mark.parametrize("name", FLOW_CASES)
@pytest.mark.parametrize("steps", [5, 20])
def test_on_a_flow(name, steps):
    make, config, sample = FLOW_CASES[name]
    grid = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64)
    ours = sample(Mixture().denoiser(), X, grid, None)
    assert_close(ours, on_a_flow(make, grid, **config))


TABLE_CASES = {
    "1M": (dpm, {"solver_order": 1}, sample_ddim),
    "2M": (dpm, {}, sample_dpmpp_2m),
    "UniPC-2": (unipc, {}, sample_unipc),
    "UniPC-3": (unipc, {"solver_order": 3}, partial(sample_unipc, order=3)),
    "DEIS-2": (deis, {"lower_order_final": False}, partial(sample_deis, order=2)),
    "DEIS-3": (
        deis,
        {"solver_order": 3, "lower_order_final": False},
        partial(sample_deis, order=3),
    ),
}


@pytest.mark.parametrize("name", TABLE_CASES)
@pytest.mark.parametrize("steps", [6, 20])
def test_on_a_table_as_they_walk_it(name, steps):
    """With their own grid, to the data; DEIS in diffusers ends at the first row."""
    make, config, sample = TABLE_CASES[name]
    scheduler = make(**TABLE, **config)
    scheduler.set_timesteps(steps)
    process = DiscreteVP(scaled_linear_betas())
    mixture = Mixture(process)
    times = process.time_of_step(scheduler.timesteps.double())
    last = process.time_of_step(torch.zeros(1)) if make is deis else torch.zeros(1)
    grid = torch.cat([times, last.double()])
    assert_close(sample(mixture.denoiser(), X, grid, None), theirs(scheduler, mixture, grid))


def test_their_third_order_is_ours_with_half_the_curvature(monkeypatch):
    """They take D[0, 1, 2] for D'', which halves the second moment."""
    grid = torch.linspace(0.98, 0.02, 21, dtype=torch.float64)
    other = on_a_flow(dpm, grid, solver_order=3, solver_type="heun", **INNER)
    ours = sample_dpmpp_3m(Mixture().denoiser(), X, grid, None, seeded=False)
    assert (ours - other).abs().max() > 1e-3

    def halved(h, highest):
        return moments(h, highest) * torch.tensor([1, 1, 0.5, 1])[: highest + 1]

    monkeypatch.setattr(exponential, "moments", halved)
    assert_close(sample_dpmpp_3m(Mixture().denoiser(), X, grid, None, seeded=False), other)
