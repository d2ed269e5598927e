from functools import partial

import pytest
import torch
from exact_gaussian import PROCESSES, Gaussian, four_points

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.preconditioning import Preconditioned, edm_coefficients
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import add_noise, half_log_snr, over_dimensions
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import DiscreteVP, linear_betas, zero_terminal_snr
from ldm_core.objectives.denoising import denoising_loss
from ldm_core.objectives.weightings import edm

each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
SIGMA_DATA = 0.5
SHARES = torch.tensor([0.02, 0.3, 0.7, 0.98], dtype=torch.float64)


def raw(x, noise, cond):
    return torch.sin(2 * x) + over_dimensions(noise, x)


@each
def test_inputs_and_targets_have_unit_variance(process):
    x0, eps = four_points(0.0, SIGMA_DATA)  # (4, 1), one column per time
    t = SHARES * process.end
    c = edm_coefficients(process, t, SIGMA_DATA)
    x_t = process.alpha(t) * x0 + process.sigma(t) * eps
    target = (x0 - c.skip * x_t) / c.out
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close((c.into * x_t).square().mean(dim=0), one, rtol=1e-13, atol=0)
    torch.testing.assert_close(target.square().mean(dim=0), one, rtol=1e-12, atol=0)
    # The least c_out: what is left to predict has nothing in common with the input.
    assert (target * x_t).mean(dim=0).abs().max() < 1e-12
    worse = (x0 - (c.skip + 0.1) * x_t).square().mean(dim=0)
    assert (worse > c.out.square()).all()


@each
def test_the_loss_weight_is_one_for_the_networks_own_error(process):
    t = SHARES * process.end
    weight = edm(half_log_snr(process, t), SIGMA_DATA)
    out = edm_coefficients(process, t, SIGMA_DATA).out
    torch.testing.assert_close(weight * out**2, torch.ones_like(t), rtol=1e-12, atol=0)


@each
def test_the_weighted_loss_is_that_of_the_raw_network(process):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator)
    t = SHARES * process.end
    network = Preconditioned(raw, process, SIGMA_DATA)
    weighting = partial(edm, sigma_data=SIGMA_DATA)
    loss = denoising_loss(network, process, Prediction.X0, x0, eps, t, None, weighting)
    c = edm_coefficients(process, t, SIGMA_DATA)
    skip, out, into = (over_dimensions(each, x0) for each in (c.skip, c.out, c.into))
    x_t = add_noise(process, x0, eps, t)
    own = raw(into * x_t, c.noise, None) - (x0 - skip * x_t) / out
    torch.testing.assert_close(loss, own.square().mean(dim=1), rtol=1e-9, atol=0)


@each
def test_a_network_of_zeros_denoises_normal_data(process):
    x_t, t = torch.randn(4, 3, dtype=torch.float64), SHARES * process.end
    denoiser = Denoiser(
        Preconditioned(lambda x, noise, cond: torch.zeros_like(x), process, SIGMA_DATA),
        process,
        Prediction.X0,
    )
    exact = Gaussian(process, 0.0, SIGMA_DATA)
    torch.testing.assert_close(denoiser.denoise(x_t, t, None), exact.x0(x_t, t))
    torch.testing.assert_close(denoiser.velocity(x_t, t, None), exact.velocity(x_t, t))


def test_the_papers_formulas():
    """Karras et al. 2022, Table 1, where time is the noise level."""
    process, sigma = VarianceExploding(), torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    total = sigma**2 + SIGMA_DATA**2
    expected = (SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total**0.5, total**-0.5)
    c = edm_coefficients(process, sigma, SIGMA_DATA)
    torch.testing.assert_close((c.skip, c.out, c.into), expected)
    torch.testing.assert_close(c.noise, sigma.log() / 4)


@pytest.mark.parametrize("name", ["trig", "vp sde", "linear"])
def test_on_the_circle_the_network_predicts_minus_v(name):
    process = PROCESSES[name]
    x_t, t = torch.randn(4, 3, dtype=torch.float64), SHARES * process.end

    def v(x, time, cond):
        return -raw(x, -half_log_snr(process, time) / 4, cond)

    preconditioned = Preconditioned(raw, process, 1.0)(x_t, t, None)
    expected = Denoiser(v, process, Prediction.V).denoise(x_t, t, None)
    torch.testing.assert_close(preconditioned, expected)


@each
def test_the_data_is_its_own_estimate_at_time_zero(process):
    x, zero = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert torch.equal(Preconditioned(raw, process, SIGMA_DATA)(x, zero, None), x)


def test_pure_noise_is_no_special_case():
    process = DiscreteVP(zero_terminal_snr(linear_betas()))
    x, end = torch.randn(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    estimate = Preconditioned(raw, process, SIGMA_DATA)(x, end, None)
    torch.testing.assert_close(estimate, SIGMA_DATA * raw(x, torch.full_like(end, 5.0), None))


def test_a_width_of_nothing_is_refused():
    with pytest.raises(ValueError, match="above 0, got 0"):
        Preconditioned(raw, VarianceExploding(), 0.0)
