"""Every stochastic sampler at both ends of every process: pure noise and the data itself."""

from functools import partial

import pytest
import torch
from covering import covering
from gaussian_probe import PROCESSES, gaussian

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.consistency import sample_consistency
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama
from ldm_core.samplers.noise import BrownianPath, counter_noise

IDS, SHAPE = torch.arange(3), (2,)


def by_noise(sample, **arguments):
    return lambda process: partial(sample, noise=counter_noise(0, IDS, SHAPE), **arguments)


def by_path(sample, **arguments):
    return lambda process: partial(
        sample, path=BrownianPath(0, IDS, SHAPE, process.end, depth=10), **arguments
    )


def level(process, t):
    """A squared diffusion that is finite at pure noise, as SiT has it."""
    return process.sigma(t)


SAMPLERS = {
    "ddpm": by_noise(sample_ddpm),
    "ddpm large": by_noise(sample_ddpm, variance="fixed_large"),
    "ddim": by_noise(sample_ddim_eta, eta=0.5),
    "euler ancestral": by_noise(sample_euler_ancestral),
    "2s ancestral": by_noise(sample_dpmpp_2s_ancestral),
    "2s ancestral, no noise": by_noise(sample_dpmpp_2s_ancestral, eta=0.0),
    "euler maruyama": by_noise(sample_euler_maruyama, diffusion=level),
    "churn": by_noise(sample_churn),
    "2m sde": by_path(sample_dpmpp_2m_sde),
    "2m sde, no noise": by_path(sample_dpmpp_2m_sde, eta=0.0),
    "sde": by_path(sample_dpmpp_sde),
    "er sde 1": by_noise(sample_er_sde, stages=1),
    "er sde 3": by_noise(sample_er_sde, stages=3),
    "consistency": by_noise(sample_consistency),
}
each_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())
on_some_process = pytest.mark.parametrize(("make", "process"), covering(SAMPLERS, PROCESSES))


@on_some_process
@pytest.mark.parametrize("steps", [1, 4])
def test_a_point_mass_is_hit_exactly(make, process, steps):
    point = torch.randn(3, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x_t, t, cond: point, process, Prediction.X0)
    x_T = torch.randn(3, 2, dtype=torch.float64) * process.prior_std
    grid = linear_grid(steps, 3.0, torch.float64) * process.end
    result = make(process)(denoiser, x_T, grid, None)
    torch.testing.assert_close(result, point, rtol=0, atol=1e-12)


@on_some_process
def test_single_precision_from_pure_noise_to_the_data(make, process):
    """In float32 the levels at pure noise may be on the wrong side of it: cos(pi / 2) < 0."""
    x_T = torch.randn(3, 2) * process.prior_std
    grid = linear_grid(6) * process.end
    sample, denoiser = make(process), gaussian(process)
    result = sample(denoiser, x_T, grid, None)
    assert result.dtype == torch.float32
    precise = sample(denoiser, x_T.double(), grid.double(), None)
    torch.testing.assert_close(result.double(), precise, rtol=0, atol=2e-3)


@each_sampler
def test_watching_changes_nothing(make):
    process, events = PROCESSES["flow"], []
    denoiser, grid = gaussian(process), linear_grid(5, dtype=torch.float64)
    x_T = torch.randn(3, 2, dtype=torch.float64)
    sample = make(process)
    result = sample(denoiser, x_T, grid, None, events.append)
    assert torch.equal(result, sample(denoiser, x_T, grid, None))
    assert [event.index for event in events] == list(range(5))
    assert torch.equal(events[0].x_t, x_T)
    for event in events:
        torch.testing.assert_close(event.x0, denoiser.denoise(event.x_t, event.t, None))


@each_sampler
def test_the_network_is_never_asked_about_the_data(make):
    times = []

    def network(x_t, t, cond):
        times.append(float(t[0]))
        return x_t / 2

    process = PROCESSES["flow"]
    x_T = torch.randn(3, 2, dtype=torch.float64)
    denoiser = Denoiser(network, process, Prediction.X0)
    make(process)(denoiser, x_T, linear_grid(4, dtype=torch.float64), None)
    assert 4 <= len(times) <= 8
    assert 0 < min(times) <= max(times) <= 1


@each_sampler
@pytest.mark.parametrize("name", ["flow", "vp sde"])
def test_states_of_16_bits_stay_so(make, name):
    """A network of 16 bits takes no others: no draw may widen a state."""
    process, seen = PROCESSES[name], set()

    def network(x_t, t, cond):
        seen.add(x_t.dtype)
        return x_t / 2

    x_T = torch.randn(3, 2).bfloat16()
    grid = linear_grid(4) * process.end
    result = make(process)(Denoiser(network, process, Prediction.X0), x_T, grid, None)
    assert seen == {torch.bfloat16}
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()
