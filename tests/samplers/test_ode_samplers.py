import numpy as np
import pytest
import torch
from analytic import Mixture, caption, gaussian_denoiser, order

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.heun import sample_heun

START, END = 0.98, 0.02


@pytest.mark.parametrize(("sample", "expected"), [(sample_euler, 1.0), (sample_heun, 2.0)])
def test_order_on_an_exact_mixture(sample, expected):
    mixture = Mixture()
    denoiser = Denoiser(mixture.x0, FlowProcess(), Prediction.X0)
    x_T = np.linspace(-2, 2, 41)
    exact = mixture.flow_map(x_T, START, END)
    errors = []
    for steps in (80, 160, 320):
        grid = torch.linspace(START, END, steps + 1, dtype=torch.float64)
        result = sample(denoiser, torch.from_numpy(x_T)[:, None], grid, None)
        errors.append(np.abs(result[:, 0].numpy() - exact).max())
    assert order(errors) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("sample", [sample_euler, sample_heun])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_point_mass_is_hit_exactly(sample, steps):
    point = torch.randn(3, 2, dtype=torch.float64)
    denoiser = Denoiser(lambda x_t, t, cond: point, FlowProcess(), Prediction.X0)
    x_T = torch.randn(3, 2, dtype=torch.float64)
    result = sample(denoiser, x_T, linear_grid(steps, 3.0, torch.float64), None)
    torch.testing.assert_close(result, point, rtol=0, atol=1e-12)


def test_euler_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / 8 for i in range(8)])
    denoiser, cond = gaussian_denoiser(), caption(0.7, batch=5)
    x_T = torch.randn(5, 3, dtype=torch.float64)
    x = x_T
    for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        x = scheduler.step(denoiser.velocity(x, sigma, cond), t, x).prev_sample
    result = sample_euler(denoiser, x_T, linear_grid(8, dtype=torch.float64), cond)
    torch.testing.assert_close(result, x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sample", [sample_euler, sample_heun])
def test_watching_changes_nothing(sample):
    denoiser, cond, grid = gaussian_denoiser(), caption(0.7), linear_grid(5)
    x_T, events = torch.randn(1, 3), []
    result = sample(denoiser, x_T, grid, cond, events.append)
    assert torch.equal(result, sample(denoiser, x_T, grid, cond))
    assert [event.index for event in events] == list(range(5))
    assert torch.equal(torch.stack([event.t for event in events]), grid[:-1])
    assert torch.equal(events[0].x_t, x_T)
    for event in events:
        torch.testing.assert_close(event.x0, denoiser.denoise(event.x_t, event.t, cond))


def test_heun_does_not_ask_for_the_velocity_of_data():
    times = []

    def network(x_t, t, cond):
        times.append(float(t[0]))
        return -x_t

    denoiser = Denoiser(network, FlowProcess(), Prediction.VELOCITY)
    sample_heun(denoiser, torch.randn(2, 3), linear_grid(4), None)
    assert len(times) == 7
    assert min(times) > 0
