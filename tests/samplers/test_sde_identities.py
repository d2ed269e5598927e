"""Samplers that are one another, written down independently where a second form is known."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian_probe import PROCESSES, marginal
from scipy.integrate import quad
from scipy.optimize import brentq

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import karras_grid, linear_grid, log_snr_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, half_log_snr
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.ddim import sample_ddim
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.dpm_solver_singlestep import sample_dpmpp_2s
from ldm_core.samplers.er_sde import er_sde_5, sample_er_sde
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama
from ldm_core.samplers.heun import sample_heun

VE = VarianceExploding()
NO_DRAWS, ORIGINAL = torch.ones_like, lambda s: s  # phi(s) / s of the ODE and of the reverse SDE
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def mixture(process):
    """E[x0 | x_t] of (N(-1, .3^2) + N(1, .3^2)) / 2: not affine, so that nothing cancels."""

    def x0(x_t, t, cond):
        t = t[:, None]
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = alpha**2 * 0.09 + sigma**2
        mean = torch.tanh(alpha * x_t / variance)
        return mean + alpha * 0.09 / variance * (x_t - alpha * mean)

    return Denoiser(x0, process, Prediction.X0)


def noise(k):
    generator = torch.Generator().manual_seed(k)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64)


def path(t, r):
    """Not a path, but a function of both times: enough to tell two samplers apart."""
    return noise(int(1e9 * float(t)) + int(1e6 * float(r)))


START = noise(999)


def still(process, t):
    return torch.zeros_like(t)


@each_process
def test_without_noise_these_are_the_ode_samplers(process):
    grid = linear_grid(9, 2.0, torch.float64) * process.end
    denoiser, x_T = mixture(process), START * process.prior_std
    drawing, walking = {"noise": noise}, {"path": path}
    for stochastic, arguments, deterministic in (
        (sample_euler_ancestral, {"eta": 0.0, **drawing}, sample_ddim),
        (sample_ddim_eta, {"eta": 0.0, **drawing}, sample_ddim),
        (sample_er_sde, {"stages": 1, "scaler": NO_DRAWS, **drawing}, sample_ddim),
        (sample_dpmpp_2s_ancestral, {"eta": 0.0, **drawing}, sample_dpmpp_2s),
        (sample_dpmpp_sde, {"eta": 0.0, **walking}, sample_dpmpp_2s),
        (sample_dpmpp_2m_sde, {"eta": 0.0, **walking}, sample_dpmpp_2m),
        (sample_churn, {"churn": 0.0, **drawing}, sample_heun),
    ):
        result = stochastic(denoiser, x_T, grid, None, **arguments)
        close(result, deterministic(denoiser, x_T, grid, None))
    result = sample_euler_maruyama(denoiser, x_T, grid, None, noise=noise, diffusion=still)
    close(result, sample_euler(denoiser, x_T, grid, None))


@pytest.mark.parametrize(
    ("process", "grid"),
    [(FlowProcess(), linear_grid(9, 2.0, torch.float64)), (VE, karras_grid(VE, 9))],
    ids=["flow", "ve"],
)
def test_where_time_is_straight_ancestral_without_noise_is_euler(process, grid):
    x_T, denoiser = START * process.prior_std, mixture(process)
    result = sample_euler_ancestral(denoiser, x_T, grid, None, noise=noise, eta=0.0)
    close(result, sample_euler(denoiser, x_T, grid, None))


@each_process
def test_with_all_noise_these_are_ddpm(process):
    grid = linear_grid(6, dtype=torch.float64) * process.end
    denoiser, x_T = mixture(process), START * process.prior_std
    ddpm = sample_ddpm(denoiser, x_T, grid, None, noise=noise)
    close(sample_ddim_eta(denoiser, x_T, grid, None, noise=noise, eta=1.0), ddpm)
    close(sample_euler_ancestral(denoiser, x_T, grid, None, noise=noise, eta=1.0), ddpm)
    close(sample_er_sde(denoiser, x_T, grid, None, noise=noise, stages=1, scaler=ORIGINAL), ddpm)
    x = x_T  # one step of SDE-DPM-Solver++(2M) at a time is (1M)
    for k in range(6):
        x = sample_dpmpp_2m_sde(
            denoiser, x, grid[k : k + 2], None, path=lambda t, r, k=k: noise(k), eta=1.0
        )
    close(x, ddpm)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_is_down_the_ode_and_up_by_noise(eta):
    """Euler's and DPM-Solver++(2S)'s step as k-diffusion has them, on sigma."""
    grid, denoiser = karras_grid(VE, 8, low=0.02), mixture(VE)
    x = x2 = START * VE.prior_std
    for k, (t, r) in enumerate(pairwise(grid)):
        up = eta * (r**2 * (t**2 - r**2) / t**2).sqrt()
        down = (r**2 - up**2).sqrt()
        d = (x - denoiser.denoise(x, t, None)) / t
        x = x + d * (down - t) + noise(k) * up
        x0 = denoiser.denoise(x2, t, None)
        if down > 0:
            s = (t * down).sqrt()
            x0 = denoiser.denoise(s / t * x2 + (1 - s / t) * x0, s, None)
        x2 = down / t * x2 + (1 - down / t) * x0 + noise(k) * up
    start = START * VE.prior_std
    close(sample_euler_ancestral(denoiser, start, grid, None, noise=noise, eta=eta), x)
    close(sample_dpmpp_2s_ancestral(denoiser, start, grid, None, noise=noise, eta=eta), x2)


def slope(process, denoiser, x, t):
    """dx/dt of the ODE, alpha' D + sigma' (x - alpha D) / sigma: EDM's d on any process."""
    x0 = denoiser.denoise(x, t, None)
    eps = (x - process.alpha(t) * x0) / process.sigma(t)
    return process.alpha_derivative(t) * x0 + process.sigma_derivative(t) * eps


def time_with(process, rho, above):
    """Where sigma / alpha is rho, by bisection."""

    def excess(t):
        t = torch.tensor(t, dtype=torch.float64)
        return float(process.sigma(t) - rho * process.alpha(t))

    found = brentq(excess, float(above), process.end, xtol=1e-16, rtol=1e-15)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", ["ve", "flow", "vp sde"])
def test_churn_is_algorithm_2_of_edm(name):
    """On VE as printed, where rho is t and alpha 1; elsewhere its levels are sigma / alpha."""
    process, s_min, s_max, s_noise = PROCESSES[name], 0.05, 50.0, 1.003
    grid, denoiser = karras_grid(process, 8), mixture(process)
    x = start = START * marginal(process, grid[0])[1]
    gammas = []
    for k, (t, r) in enumerate(pairwise(grid)):
        rho = process.sigma(t) / process.alpha(t)
        gamma = min(3 / 8, 2**0.5 - 1) if s_min <= rho <= s_max else 0.0
        gammas.append(gamma)
        t_hat = time_with(process, (1 + gamma) * rho, t) if gamma else t
        kept = process.alpha(t_hat) / process.alpha(t)
        added = process.sigma(t_hat) ** 2 - (kept * process.sigma(t)) ** 2
        x_hat = kept * x + added.clamp(min=0).sqrt() * s_noise * noise(k)
        if r == 0:
            x = denoiser.denoise(x_hat, t_hat, None)
            break
        d = slope(process, denoiser, x_hat, t_hat)
        d_r = slope(process, denoiser, x_hat + (r - t_hat) * d, r)
        x = x_hat + (r - t_hat) * (d + d_r) / 2
    assert gammas[0] == gammas[-1] == 0 < gammas[3]
    chosen = {"churn": 3.0, "interval": (s_min, s_max), "noise_scale": s_noise}
    close(sample_churn(denoiser, start, grid, None, noise=noise, **chosen), x)


def test_2m_without_noise_is_dpm_solver_pp_2m():
    """Lu et al. 2022b, Algorithm 2, on VE, where alpha is 1."""
    grid, denoiser = karras_grid(VE, 9), mixture(VE)
    x, h_last, old = START * VE.prior_std, None, None
    for t, r in pairwise(grid):
        x0, h = denoiser.denoise(x, t, None), (t / r).log()
        held = x0 if h_last is None or r == 0 else x0 + (x0 - old) * h / h_last / 2
        x = r / t * x - torch.expm1(-h) * held
        h_last, old = h, x0
    result = sample_dpmpp_2m_sde(denoiser, START * VE.prior_std, grid, None, path=path, eta=0.0)
    close(result, x)


@each_process
def test_the_path_is_the_same_on_every_process(process):
    """x / alpha on equal sigma / alpha: samplers that know nothing but levels."""
    results = []
    for other in (VE, process):
        grid = log_snr_grid(other, 7, first=-2.0, last=2.0, to_data=False)
        alpha, denoiser = other.alpha(grid), mixture(other)

        def drawn(t, r, process=other):
            at, to = (round(1e3 * float(half_log_snr(process, time))) for time in (t, r))
            return noise(10_000 * (at + 3000) + to + 3000)

        samplers = [
            partial(sample_ddim_eta, noise=noise, eta=0.6),
            partial(sample_dpmpp_2s_ancestral, noise=noise, eta=0.6),
            partial(sample_er_sde, noise=noise),
            partial(sample_dpmpp_2m_sde, path=drawn),
            partial(sample_dpmpp_sde, path=drawn),
        ]
        x_T = START * 8 * alpha[0]
        results.append([sample(denoiser, x_T, grid, None) / alpha[-1] for sample in samplers])
    for ours, on_ve in zip(*results, strict=True):
        torch.testing.assert_close(ours, on_ve, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaler", [NO_DRAWS, ORIGINAL, er_sde_5], ids=["s", "s^2", "5"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_er_sde_integrates_its_polynomial_exactly(scaler, stages):
    """Against scipy's quadrature of phi_r int phi' / phi^2 p, p having the last differences of D.

    D = cos(sigma), so every difference counts; by parts the integral is that of p' / phi.
    """

    def phi(s):
        return s * float(scaler(torch.tensor(s, dtype=torch.float64)))

    denoiser = Denoiser(lambda x, t, cond: t[:, None].cos().expand_as(x), VE, Prediction.X0)
    rho = np.array([5.0, 3.1, 2.0, 0.9, 0.2])
    grid, states = torch.from_numpy(rho), []
    result = sample_er_sde(
        denoiser,
        START,
        grid,
        None,
        on_step=lambda event: states.append(event.x_t),
        noise=lambda k: torch.zeros_like(START),
        stages=stages,
        scaler=scaler,
    )
    d = np.cos(rho)
    slopes = np.diff(d) / np.diff(rho)  # slopes[k - 1] is known at time k
    for k, (start, end) in enumerate(pairwise([*states, result])):
        t, r = rho[k], rho[k + 1]
        p = np.polynomial.Polynomial([d[k]])
        if k >= 1 and stages >= 2:
            p += slopes[k - 1] * np.polynomial.Polynomial([-t, 1])
        if k >= 2 and stages >= 3:
            curvature = (slopes[k - 1] - slopes[k - 2]) / ((t - rho[k - 2]) / 2)
            p += curvature / 2 * np.polynomial.Polynomial([-t, 1]) ** 2
        inner, _ = quad(lambda s, p=p: p.deriv()(s) / phi(s), r, t, epsabs=1e-13, epsrel=1e-13)
        drift = p(r) - phi(r) / phi(t) * p(t) + phi(r) * inner
        torch.testing.assert_close(end, phi(r) / phi(t) * start + drift, rtol=1e-11, atol=1e-11)
