import math

import pytest
import torch

from ldm_core.diffusion.process import (
    FlowProcess,
    add_noise,
    batch_time,
    drift_rate,
    half_log_snr,
    log_snr,
    squared_diffusion,
)
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import (
    VPSDE,
    DiscreteVP,
    TrigFlow,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)

PROCESSES = {
    "flow": FlowProcess(),
    "trig": TrigFlow(),
    "vp sde": VPSDE(),
    "linear": DiscreteVP(linear_betas()),
    "scaled linear": DiscreteVP(scaled_linear_betas()),
    "cosine": DiscreteVP(cosine_betas()),
    "zero terminal": DiscreteVP(zero_terminal_snr(scaled_linear_betas())),
    "ve": VarianceExploding(),
}
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def inner_times(process, count=200):
    """Between the ends, and off the rows of a table of 1000, where its slope jumps."""
    return torch.linspace(0.0123, 0.9877, count, dtype=torch.float64) * process.end + 1.7e-4


def test_ends_are_data_and_noise():
    x0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x_t = add_noise(FlowProcess(), x0, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], eps[1])
    assert torch.equal(add_noise(FlowProcess(), x0, eps, torch.tensor(1.0)), eps)


@each
def test_starts_at_the_data_and_only_gets_noisier(process):
    t = torch.linspace(0, process.end, 4001, dtype=torch.float64)
    assert process.alpha(t[:1]) == 1
    assert process.sigma(t[:1]) == 0
    ratio = process.sigma(t) / process.alpha(t)
    assert (ratio.diff() > 0).all()


@each
def test_derivatives_are_those_of_the_levels(process):
    t = inner_times(process)
    for level, derivative in (
        (process.alpha, process.alpha_derivative),
        (process.sigma, process.sigma_derivative),
    ):
        _, exact = torch.func.jvp(level, (t,), (torch.ones_like(t),))
        torch.testing.assert_close(derivative(t), exact, rtol=1e-10, atol=1e-13)


@each
def test_time_of_is_the_inverse_of_half_log_snr(process):
    t = inner_times(process)
    torch.testing.assert_close(process.time_of(half_log_snr(process, t)), t, rtol=1e-10, atol=0)
    assert log_snr(process, t).allclose(2 * half_log_snr(process, t))


@each
def test_the_sde_has_the_levels_as_its_moments(process):
    """d ln(mean) / dt = f and d(var) / dt = 2 f var + g^2, for a point mass of data at 1."""
    t = inner_times(process)
    one = (torch.ones_like(t),)
    mean, mean_slope = torch.func.jvp(process.alpha, (t,), one)
    var, var_slope = torch.func.jvp(lambda t: process.sigma(t).square(), (t,), one)
    f, g2 = drift_rate(process, t), squared_diffusion(process, t)
    torch.testing.assert_close(mean_slope, f * mean)
    torch.testing.assert_close(var_slope, 2 * f * var + g2)


def test_the_vp_sde_diffuses_at_beta():
    process, t = VPSDE(), inner_times(VPSDE())
    torch.testing.assert_close(squared_diffusion(process, t), 0.1 + 19.9 * t)


@pytest.mark.parametrize("name", ["linear", "scaled linear", "cosine", "zero terminal"])
def test_tables_hold_their_levels_at_their_steps(name):
    process = PROCESSES[name]
    betas = {
        "linear": linear_betas(),
        "scaled linear": scaled_linear_betas(),
        "cosine": cosine_betas(),
        "zero terminal": zero_terminal_snr(scaled_linear_betas()),
    }[name]
    rows = torch.arange(1000, dtype=torch.float64)
    t = process.time_of_step(rows)
    torch.testing.assert_close(
        process.alpha(t).square(), (1 - betas).cumprod(0), atol=1e-14, rtol=0
    )
    torch.testing.assert_close(process.step_of(t), rows)


def test_tables_are_diffusers():
    diffusers = pytest.importorskip("diffusers")
    for ours, schedule, zero in (
        (linear_betas(), {"beta_schedule": "linear"}, False),
        (
            scaled_linear_betas(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            False,
        ),
        (cosine_betas(), {"beta_schedule": "squaredcos_cap_v2"}, False),
        (zero_terminal_snr(linear_betas()), {"beta_schedule": "linear"}, True),
    ):
        theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=zero, **schedule)
        torch.testing.assert_close(ours.float(), theirs.betas, rtol=1e-5, atol=2e-6)


def test_terminal_levels_of_the_usual_tables():
    """Figures of the schedules as they are known: alpha_T, and sigma_max of Stable Diffusion."""
    end = torch.ones((), dtype=torch.float64)
    assert PROCESSES["linear"].alpha(end).item() == pytest.approx(0.00635, abs=5e-6)
    scaled = PROCESSES["scaled linear"]
    assert scaled.alpha(end).item() == pytest.approx(0.0683, abs=5e-5)
    assert (scaled.sigma(end) / scaled.alpha(end)).item() == pytest.approx(14.61, abs=5e-3)


def test_zero_terminal_snr_ends_in_noise_and_keeps_the_first_step():
    before, process = DiscreteVP(scaled_linear_betas()), PROCESSES["zero terminal"]
    assert zero_terminal_snr(scaled_linear_betas())[-1] == 1
    first, last = torch.tensor([0.001, 1.0], dtype=torch.float64)
    assert process.alpha(last).abs() < 1e-16
    assert process.alpha(first).item() == pytest.approx(before.alpha(first).item(), abs=3e-16)


def test_a_table_of_wrong_betas_is_refused():
    with pytest.raises(ValueError, match=r"in \(0, 1\], these run from -0.1 to 0.5"):
        DiscreteVP(torch.tensor([0.5, -0.1]))


def test_log_snr_is_infinite_at_the_ends_of_a_flow():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert half_log_snr(FlowProcess(), t).tolist() == [math.inf, 0, -math.inf]


def test_batch_time_takes_numbers_and_tensors():
    x = torch.zeros(3, 1, dtype=torch.bfloat16)
    for t in (0.25, torch.tensor(0.25), torch.full((3,), 0.25, dtype=torch.float64)):
        assert torch.equal(batch_time(t, x), torch.full((3,), 0.25))


def test_a_table_has_no_time_beyond_its_ends():
    """The angle beyond the last row and before the first is the end's and the data's time."""
    table = DiscreteVP(linear_betas())
    lambdas = torch.tensor([-40.0, -torch.inf, torch.inf], dtype=torch.float64)
    assert table.time_of(lambdas).tolist() == [1.0, 1.0, 0.0]
