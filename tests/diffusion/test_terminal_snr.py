"""What starting from N(0, 1) does to a process that does not end there."""

from functools import partial

import pytest
import torch
from analytic import order
from exact_gaussian import Gaussian

from ldm_core.diffusion.grids import log_snr_grid, table_grid
from ldm_core.diffusion.process import half_log_snr
from ldm_core.diffusion.variance_preserving import (
    DiscreteVP,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from ldm_core.samplers.ddim import sample_ddim
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m, sample_dpmpp_3m

MEAN, STD = 0.5, 0.3
END = torch.ones((), dtype=torch.float64)
LINEAR, SCALED = DiscreteVP(linear_betas()), DiscreteVP(scaled_linear_betas())
ZERO = DiscreteVP(zero_terminal_snr(scaled_linear_betas()))


def sampled(sample, process, grid, mean=0.0, std=1.0):
    """Mean and standard deviation of what becomes of N(mean, std^2), in which it is affine."""
    x_T = torch.tensor([[mean], [mean + std]], dtype=torch.float64)
    low, high = sample(Gaussian(process, MEAN, STD).denoiser(), x_T, grid, None).flatten().tolist()
    return low, high - low


def predicted(process, t=END):
    """What the exact ODE makes of N(0, 1) at t: m (1 - a S / sqrt(V)) and S / sqrt(V)."""
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()
    root = (alpha**2 * STD**2 + sigma**2) ** 0.5
    return MEAN * (1 - alpha * STD / root), STD / root


def to_the_data(process, steps, t=END):
    """Equal steps of lambda from t to where e^-24 of the noise's variance is left, then the data:
    what the last step misses, as no step can go on in lambda, is of that size.
    """
    return log_snr_grid(process, steps, half_log_snr(process, t).item(), 12.0)


each_table = pytest.mark.parametrize("process", [LINEAR, SCALED], ids=["linear", "scaled linear"])


@pytest.mark.parametrize(
    ("process", "alpha", "mean"), [(LINEAR, 0.00635, 0.49905), (SCALED, 0.0683, 0.48974)]
)
def test_the_mean_is_pulled_towards_zero_by_what_signal_is_left(process, alpha, mean):
    """Sampling starts from N(0, 1), not from N(alpha_T m, V_T)."""
    assert process.alpha(END).item() == pytest.approx(alpha, rel=1e-3)
    assert predicted(process)[0] == pytest.approx(mean, abs=5e-6)
    found = sampled(sample_dpmpp_3m, process, to_the_data(process, 400))
    assert found[0] == pytest.approx(predicted(process)[0], abs=2e-9)
    assert found[1] == pytest.approx(predicted(process)[1], abs=1e-7)


@each_table
@pytest.mark.parametrize(("sample", "expected"), [(sample_ddim, 1), (sample_dpmpp_2m, 2)])
def test_samplers_near_the_formula_by_their_order(process, sample, expected):
    found = [sampled(sample, process, to_the_data(process, steps)) for steps in (50, 100, 200)]
    for values, limit in zip(zip(*found, strict=True), predicted(process), strict=True):
        errors = [abs(value - limit) for value in values]
        assert order(errors) == pytest.approx(expected, abs=0.05)


@each_table
def test_on_the_tables_own_rows_it_is_the_same(process):
    """As `sample_ddim` is used, of order 1 until every row is visited."""
    grids = [table_grid(process, steps) for steps in (250, 500, 1000)]
    errors = [sampled(sample_ddim, process, grid)[0] - predicted(process)[0] for grid in grids]
    assert order(errors) == pytest.approx(1, abs=0.2)
    assert 0 < errors[-1] < (MEAN - predicted(process)[0]) / 100


@pytest.mark.parametrize("sample", [sample_ddim, sample_dpmpp_2m, sample_dpmpp_3m])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_without_signal_at_the_end_there_is_no_bias(sample, steps):
    """Whatever the number of steps: from the right mean, every estimate is m."""
    mean, _ = sampled(sample, ZERO, table_grid(ZERO, steps))
    assert mean == pytest.approx(MEAN, abs=1e-12)


@pytest.mark.parametrize("steps", [4, 50])
def test_the_wrong_end_is_all_that_is_wrong(steps):
    """From N(alpha_T m, V_T) the same table in the same steps gives m, and N(0, 1) does not."""
    run = partial(sampled, sample_dpmpp_2m, SCALED, table_grid(SCALED, steps))
    assert run(SCALED.alpha(END).item() * MEAN)[0] == pytest.approx(MEAN, abs=1e-12)
    assert run()[0] < MEAN - 3e-3


def test_a_grid_that_leaves_out_the_last_row_brings_the_bias_back():
    """Lin et al. 2024, Sec. 3.3: "leading" starts from N(0, 1) where there still is signal."""
    t = table_grid(ZERO, 50, "leading")[0]
    expected, _ = predicted(ZERO, t)
    assert expected < MEAN - 1e-3
    mean, _ = sampled(sample_dpmpp_3m, ZERO, to_the_data(ZERO, 400, t))
    assert mean == pytest.approx(expected, abs=2e-9)
