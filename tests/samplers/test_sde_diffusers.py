"""The same trajectories as diffusers' schedulers, the same draws injected.

Their tables are float32, so the tolerance is 1e-5 of the largest value. `EDMEulerScheduler` adds
its churn after the network was asked about the state without it, so it is no reference for that.
"""

from functools import partial

import pytest
import torch
from gaussian_probe import MEAN, STD, gaussian

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import table_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import DiscreteVP, linear_betas, scaled_linear_betas
from ldm_core.samplers.ancestral import sample_euler_ancestral
from ldm_core.samplers.consistency import sample_consistency
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde

diffusers = pytest.importorskip("diffusers")
TABLE = DiscreteVP(linear_betas())
SCHEDULE = {"timestep_spacing": "trailing", "clip_sample": False, "prediction_type": "sample"}


def generator(k):
    return torch.Generator().manual_seed(k)


def noise(k, dtype=torch.float64):
    return torch.randn(5, 3, generator=generator(k), dtype=dtype)


def close(ours, theirs):
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5 * max(scale, 1.0))


X_T = noise(999)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("steps", [4, 50])
def test_ddpm(variance, steps):
    scheduler = diffusers.DDPMScheduler(variance_type=variance, **SCHEDULE)
    scheduler.set_timesteps(steps)
    denoiser, x = gaussian(TABLE), X_T
    for k, row in enumerate(scheduler.timesteps):
        x0 = denoiser.denoise(x, TABLE.time_of_step(row), None)
        x = scheduler.step(x0, row, x, generator=generator(k)).prev_sample
    result = sample_ddpm(
        denoiser,
        X_T,
        table_grid(TABLE, steps),
        None,
        noise=noise,
        variance=variance,
        noisy_end=variance == "fixed_large",  # theirs is, where the last row is not 0
    )
    close(result, x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta):
    scheduler = diffusers.DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(20)
    denoiser, x = gaussian(TABLE), X_T
    for k, row in enumerate(scheduler.timesteps):
        x0 = denoiser.denoise(x, TABLE.time_of_step(row), None)
        x = scheduler.step(x0, row, x, eta=eta, variance_noise=noise(k)).prev_sample
    grid = table_grid(TABLE, 20)
    close(sample_ddim_eta(denoiser, X_T, grid, None, noise=noise, eta=eta), x)


def test_euler_ancestral():
    """On a table, where theirs runs in x / alpha; ours in x, and on VE as well."""
    table = DiscreteVP(scaled_linear_betas())
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(12)
    ve = VarianceExploding(float(scheduler.sigmas[0]))
    denoiser, y = gaussian(ve), X_T.float() * scheduler.sigmas[0]
    start = y.double()
    for k, row in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k]
        scheduler.scale_model_input(y, row)
        eps = (y - denoiser.denoise(y, sigma, None)) / sigma
        y = scheduler.step(eps, row, y, generator=generator(k)).prev_sample
    single = partial(noise, dtype=torch.float32)
    grid = scheduler.sigmas.double()
    close(sample_euler_ancestral(denoiser, start, grid, None, noise=single), y)
    grid = table_grid(table, 12)
    x_T = start * table.alpha(grid[0])
    close(sample_euler_ancestral(gaussian(table), x_T, grid, None, noise=single), y)


def test_sde_dpm_solver_pp_2m():
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint"
    )
    scheduler.set_timesteps(12)
    ve, grid = VarianceExploding(float(scheduler.sigmas[0])), scheduler.sigmas.double()
    denoiser, x = gaussian(ve), X_T * scheduler.sigmas[0]
    start, data = x, scheduler.config.sigma_data
    for k, row in enumerate(scheduler.timesteps):
        sigma = grid[k]
        skip = data**2 / (sigma**2 + data**2)
        out = sigma * data / (sigma**2 + data**2).sqrt()
        raw = (denoiser.denoise(x, sigma, None) - skip * x) / out
        x = scheduler.step(raw, row, x, generator=generator(k)).prev_sample

    def path(t, r):
        return noise(int((grid > t).sum()))

    close(sample_dpmpp_2m_sde(denoiser, start, grid, None, path=path), x)


def test_consistency_sampling_of_a_flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    flow = FlowProcess()

    def network(x, t, cond):
        return MEAN + STD * (1 - t[:, None]) * (x - MEAN)

    student = Denoiser(network, flow, Prediction.X0)
    x = X_T.float()
    for k, row in enumerate(scheduler.timesteps):
        v = (x - student.denoise(x, scheduler.sigmas[k], None)) / scheduler.sigmas[k]
        x = scheduler.step(v, row, x, generator=generator(k)).prev_sample
    grid, single = scheduler.sigmas.double(), partial(noise, dtype=torch.float32)
    close(sample_consistency(student, X_T.float().double(), grid, None, noise=single), x)
