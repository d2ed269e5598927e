"""Gaussian data of known covariance: the sampler is affine in the known latents and all noises, so
its run without noise is the exact mean."""

import pytest
import torch
from analytic import order
from scipy.integrate import solve_ivp

from ldm_core.conditioning import replacement
from ldm_core.conditioning.replacement import renoise, sample_replacement
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.heun import sample_heun

PROCESSES = [FlowProcess(), VarianceExploding(), VPSDE(), DiscreteVP(linear_betas()), TrigFlow()]
# pixels 0 and 2 are known, 1 and 3 are not
FACTOR = torch.tensor(
    [[1.0, 0, 0, 0], [0.8, 0.5, 0, 0], [-0.3, 0.4, 0.9, 0], [0.2, 0.6, 0.5, 0.4]],
    dtype=torch.float64,
)
COVARIANCE = FACTOR @ FACTOR.T
KNOWN = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64).view(1, 1, 1, 4)
X0 = torch.tensor([0.9, torch.nan, -0.4, torch.nan], dtype=torch.float64).view(1, 1, 1, 4)
k, u = torch.tensor([0, 2]), torch.tensor([1, 3])


def denoiser_of(process, covariance=COVARIANCE):
    def x0(x_t, t, cond):
        alpha, sigma = process.alpha(t)[0], process.sigma(t)[0]
        total = alpha**2 * covariance + sigma**2 * torch.eye(4, dtype=torch.float64)
        return x_t @ (alpha * torch.linalg.solve(total, covariance))

    return Denoiser(x0, process, Prediction.X0)


def no_noise(x):
    return torch.zeros_like(x)


def to_data(denoiser, x_t, grid, cond):
    """The last step of every deterministic sampler, and of most others: x_t -> D."""
    return denoiser.denoise(x_t, grid[0], cond)


def mean(sampler, process, grid, repeats=1):
    x_T = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    result = sample_replacement(
        sampler, denoiser_of(process), x_T, grid, None, X0, KNOWN, no_noise, repeats
    )
    return result[0, 0, 0]


def regression(extra_variance=0.0):
    """S_uk (S_kk + v)^-1 x_k; the conditional mean for v = 0."""
    inner = COVARIANCE[k][:, k] + extra_variance * torch.eye(2, dtype=torch.float64)
    return COVARIANCE[u][:, k] @ torch.linalg.solve(inner, X0[0, 0, 0, k])


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_the_known_region_is_exact(sampler):
    x_T = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    x0, known = torch.randn_like(x_T), (torch.rand(3, 1, 4, 4) > 0.5).double()
    denoiser = Denoiser(lambda x, t, c: x.cos(), FlowProcess(), Prediction.VELOCITY)
    grid = linear_grid(5, dtype=torch.float64)
    result = sample_replacement(
        sampler, denoiser, x_T, grid, None, x0, known, torch.randn_like, repeats=3
    )
    inside = (known > 0).expand_as(x0)
    assert torch.equal(result[inside], x0[inside])
    assert (result != x0)[~inside].all()


def test_everything_or_nothing_known():
    x_T, grid = torch.randn(1, 1, 1, 4, dtype=torch.float64), linear_grid(6, dtype=torch.float64)
    x0, denoiser = torch.randn_like(x_T), denoiser_of(FlowProcess())
    arguments = (sample_euler, denoiser, x_T, grid, None, x0)
    nothing = sample_replacement(*arguments, torch.zeros_like(KNOWN), torch.randn_like)
    assert torch.equal(nothing, sample_euler(denoiser, x_T, grid, None))
    everything = sample_replacement(*arguments, torch.ones_like(KNOWN), torch.randn_like)
    assert torch.equal(everything, x0)


def test_an_independent_region_is_sampled_as_if_alone():
    apart = torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.3], dtype=torch.float64))
    denoiser = denoiser_of(FlowProcess(), apart)
    x_T, grid = torch.randn(1, 1, 1, 4, dtype=torch.float64), linear_grid(6, dtype=torch.float64)
    result = sample_replacement(sample_heun, denoiser, x_T, grid, None, X0, KNOWN, torch.randn_like)
    alone = sample_heun(denoiser, x_T, grid, None)
    torch.testing.assert_close(result[..., u], alone[..., u], rtol=0, atol=1e-14)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("last", [0.2, 0.4])
def test_a_repeated_last_step_regresses_on_the_noisy_known_region(process, last):
    time = torch.tensor(last, dtype=torch.float64)
    grid = torch.stack([time, time.new_zeros(())])
    variance = (process.sigma(time) / process.alpha(time)).square()
    result = mean(to_data, process, grid, repeats=400)
    torch.testing.assert_close(result[u], regression(variance), rtol=0, atol=1e-9)
    assert (result[u] - regression()).abs().max() > 1e-3


def test_repeats_and_steps_together_reach_the_conditional_mean():
    errors = []
    for steps in (3, 6, 12):
        grid = linear_grid(steps, dtype=torch.float64)
        result = mean(sample_euler, FlowProcess(), grid, repeats=steps**2)
        errors.append(float((result[u] - regression()).abs().max()))
    assert order(errors) == pytest.approx(2, abs=0.3)  # sigma^2 / alpha^2 of the last step
    assert errors[-1] < 1e-2


def test_repeats_only_ever_help():
    grid = linear_grid(20, dtype=torch.float64)
    errors = [
        float((mean(sample_euler, FlowProcess(), grid, n)[u] - regression()).abs().max())
        for n in (1, 2, 4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_plain_replacement_converges_to_something_else():
    denoiser = denoiser_of(FlowProcess())

    def rate(time, x):  # of the unknown region beside alpha x_k
        state = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
        state[..., u] = torch.from_numpy(x)
        state[..., k] = (1 - time) * X0[..., k]
        return denoiser.velocity(state, float(time), None)[0, 0, 0, u].numpy()

    limit = torch.from_numpy(
        solve_ivp(rate, (1, 1e-9), [0.0, 0.0], rtol=1e-10, atol=1e-12).y[:, -1]
    )
    errors = []
    for steps in (50, 100, 200):
        result = mean(sample_euler, FlowProcess(), linear_grid(steps, dtype=torch.float64))
        errors.append(float((result[u] - limit).abs().max()))
    assert order(errors) == pytest.approx(1, abs=0.15)
    assert (limit - regression()).abs().max() > 0.05


def test_a_known_region_put_in_without_its_noise_level_is_caught(monkeypatch):
    monkeypatch.setattr(replacement, "add_noise", lambda process, x0, eps, t: x0)
    grid = torch.tensor([0.4, 0.0], dtype=torch.float64)
    result = mean(to_data, FlowProcess(), grid, repeats=400)
    assert (result[u] - regression((0.4 / 0.6) ** 2)).abs().max() > 0.05


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_going_back_restores_the_marginals(process):
    r, t = (torch.tensor(f * process.end, dtype=torch.float64) for f in (0.3, 0.7))
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    kept, added = renoise(process, one, r, t, zero), renoise(process, zero, r, t, one)
    torch.testing.assert_close(kept * process.alpha(r), process.alpha(t).expand(1))
    variance = (kept * process.sigma(r)).square() + added.square()
    torch.testing.assert_close(variance, process.sigma(t).square().expand(1))


def test_mistakes_are_refused_with_both_values():
    x_T, grid = torch.zeros(1, 1, 1, 4, dtype=torch.float64), linear_grid(3)
    arguments = (sample_euler, denoiser_of(FlowProcess()))
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 4\) has a mask of .*got \(1, 1, 4, 1\)"):
        sample_replacement(*arguments, x_T, grid, None, X0, KNOWN.mT, no_noise)
    with pytest.raises(ValueError, match=r"state \(1, 1, 1, 3\) and latent \(1, 1, 1, 4\)"):
        sample_replacement(*arguments, x_T[..., :3], grid, None, X0, KNOWN, no_noise)
    with pytest.raises(ValueError, match="repeats = 0"):
        sample_replacement(*arguments, x_T, grid, None, X0, KNOWN, no_noise, repeats=0)


def test_it_can_be_watched_step_by_step():
    events, grid = [], linear_grid(3, dtype=torch.float64)
    x_T = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    arguments = (sample_euler, denoiser_of(FlowProcess()), x_T, grid, None, X0, KNOWN, no_noise, 2)
    result = sample_replacement(*arguments, on_step=events.append)
    assert torch.equal(result, sample_replacement(*arguments))
    assert [event.index for event in events] == [0, 0, 1, 1, 2, 2]
    assert [float(event.t) for event in events] == grid[:-1].repeat_interleave(2).tolist()
