"""Each name gives exactly what its function gives, with the pictures' own noise."""

from functools import cache, partial

import pytest
import torch
from analytic import Mixture

from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.choice import SAMPLERS, SamplerChoice
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.deis import sample_deis
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m, sample_dpmpp_3m
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.dpm_solver_singlestep import sample_dpm_solver_2, sample_dpmpp_2s
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama
from ldm_core.samplers.heun import sample_heun
from ldm_core.samplers.noise import BrownianPath, counter_noise, seeded_noise
from ldm_core.samplers.unipc import sample_unipc

SEEDS = [3, 8, 5]
FIRST = torch.zeros(1, dtype=torch.int64)
X = torch.tensor([[-1.3], [0.2], [1.1]], dtype=torch.float64)
PLAIN = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpm-solver-2": sample_dpm_solver_2,
    "dpmpp-2s": sample_dpmpp_2s,
    "dpmpp-2m": sample_dpmpp_2m,
    "dpmpp-3m": sample_dpmpp_3m,
    "deis": sample_deis,
    "unipc": sample_unipc,
}
BY_DRAWS = {
    "ddim": partial(sample_ddim_eta, eta=0.0),
    "ddpm": sample_ddpm,
    "euler-ancestral": sample_euler_ancestral,
    "dpmpp-2s-ancestral": sample_dpmpp_2s_ancestral,
    "euler-maruyama": partial(sample_euler_maruyama, diffusion=lambda p, t: p.sigma(t)),
    "churn": partial(sample_churn, churn=40.0),
    "er-sde": partial(sample_er_sde, stages=3),
}
BY_PATH = {"dpmpp-2m-sde": sample_dpmpp_2m_sde, "dpmpp-sde": sample_dpmpp_sde}


def draws(seed):
    return counter_noise(seed, FIRST, (1,))


def by_hand(name, denoiser, x, grid, seed):
    """One picture by the function itself."""
    if name in PLAIN:
        return PLAIN[name](denoiser, x, grid, None)
    if name in BY_DRAWS:
        return BY_DRAWS[name](denoiser, x, grid, None, noise=draws(seed))
    path = BrownianPath(seed, FIRST, (1,), denoiser.process.end)
    return BY_PATH[name](denoiser, x, grid, None, path=path)


def problem(process):
    """A mixture, whose estimates bend, starts and a grid."""
    grid = log_snr_grid(process, 5, -1.5, 3.0)
    return Mixture(process).denoiser(), X * float(process.sigma(grid[0])), grid


@cache
def chosen(process):
    """What comes of the starts by name."""
    denoiser, x, grid = problem(process)
    return {name: SamplerChoice(name).sample(denoiser, x, grid, None, SEEDS) for name in SAMPLERS}


FLOW, VE = FlowProcess(), VarianceExploding()


@pytest.mark.parametrize("process", [FLOW, VE], ids=["flow", "ve"])
def test_a_name_is_its_function(process):
    denoiser, x, grid = problem(process)
    for name, found in chosen(process).items():
        alone = [by_hand(name, denoiser, x[i : i + 1], grid, s) for i, s in enumerate(SEEDS)]
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-12, atol=1e-12, msg=name)


def test_no_two_names_are_one_function():
    """On VE, but for two that are another in other words: so the test above tells names apart."""
    results = dict(chosen(VE))
    results.pop("ddim")  # is euler
    results.pop("euler-ancestral")  # is ddpm
    found = list(results.values())
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert (one - other).abs().max() > 1e-6


def test_draws_of_a_picture_are_new_at_every_step():
    noise = seeded_noise(SEEDS, X)
    assert torch.equal(noise(2), torch.cat([draws(seed)(2) for seed in SEEDS]))
    assert (noise(0) - noise(1)).abs().min() > 1e-3
