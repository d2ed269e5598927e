import pytest
import torch
from analytic import caption, gaussian_denoiser, gaussian_map

from ldm_core.conditioning.image_to_image import sample_image_to_image
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.heun import sample_heun

PROCESSES = [FlowProcess(), VarianceExploding(), VPSDE(), DiscreteVP(linear_betas()), TrigFlow()]
X0 = torch.randn(3, 2, dtype=torch.float64)
EPS = torch.randn(3, 2, dtype=torch.float64)


def smooth_denoiser(process):
    return Denoiser(lambda x_t, t, cond: x_t.sin() / 2, process, Prediction.X0)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_nothing_and_everything(sampler, process):
    grid = torch.linspace(process.end, 0, 9, dtype=torch.float64)
    arguments = (sampler, smooth_denoiser(process), EPS, grid, None, X0)
    assert torch.equal(sample_image_to_image(*arguments, strength=0.0), X0)
    plain = sampler(smooth_denoiser(process), process.prior_std * EPS, grid, None)
    assert torch.equal(sample_image_to_image(*arguments, strength=1.0), plain)


@pytest.mark.parametrize(("strength", "steps"), [(0.1, 1), (0.5, 5), (0.74, 7), (0.96, 10)])
def test_strength_is_the_share_of_the_steps(strength, steps):
    times = []

    def network(x_t, t, cond):
        times.append(float(t[0]))
        return -x_t

    denoiser = Denoiser(network, FlowProcess(), Prediction.VELOCITY)
    grid = linear_grid(10, 3.0, torch.float64)
    sample_image_to_image(sample_euler, denoiser, EPS, grid, None, X0, strength)
    assert times == grid[10 - steps : -1].tolist()


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_a_noised_picture_goes_the_exact_way_to_the_data(strength):
    cond, t = caption(0.7, batch=3), torch.full((3,), strength, dtype=torch.float64)
    grid = linear_grid(400, dtype=torch.float64)
    result = sample_image_to_image(sample_heun, gaussian_denoiser(), EPS, grid, cond, X0, strength)
    noised = (1 - strength) * X0 + strength * EPS
    exact = gaussian_map(noised, t, torch.zeros_like(t), cond)
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-4)


def test_mistakes_are_refused_with_both_values():
    arguments = (sample_euler, smooth_denoiser(FlowProcess()), EPS)
    grid = linear_grid(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.2"):
        sample_image_to_image(*arguments, grid, None, X0, 1.2)
    with pytest.raises(ValueError, match=r"\(2, 2\) and noise \(3, 2\)"):
        sample_image_to_image(*arguments, grid, None, X0[:2], 0.5)
    with pytest.raises(ValueError, match="decreases"):
        sample_image_to_image(*arguments, grid.flip(0), None, X0, 0.5)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_a_grid_that_starts_before_the_end_starts_at_its_own_noise(process):
    """However strong, the state at grid[0] is the noised picture's unless that is the end."""
    events = []
    grid = torch.linspace(0.4 * process.end, 0, 5, dtype=torch.float64)
    sample_image_to_image(
        sample_euler, smooth_denoiser(process), EPS, grid, None, X0, 1.0, events.append
    )
    assert torch.equal(events[0].x_t, process.alpha(grid[0]) * X0 + process.sigma(grid[0]) * EPS)


def test_it_can_be_watched():
    events, grid = [], linear_grid(8, dtype=torch.float64)
    arguments = (sample_heun, smooth_denoiser(FlowProcess()), EPS, grid, None, X0, 0.5)
    result = sample_image_to_image(*arguments, on_step=events.append)
    assert torch.equal(result, sample_image_to_image(*arguments))
    assert [event.index for event in events] == [0, 1, 2, 3]
    assert torch.equal(torch.stack([event.t for event in events]), grid[4:-1])
