import math

import numpy as np
import pytest
import torch
from scipy import stats

from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.timesteps import (
    log_normal,
    logit_normal,
    mode,
    shift_timesteps,
    stratified,
)
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, TrigFlow
from ldm_core.random import uniform

U = uniform(0, "timestep", 0, torch.arange(200_000), ()).double()


def p_value(samples, cdf):
    return stats.kstest(samples.numpy(), cdf).pvalue


def test_shift_moves_the_logit():
    t = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(shift_timesteps(t, 3)), torch.logit(t) + math.log(3))


@pytest.mark.parametrize("shift", [1.0, 3.0, 1 / 0.3])
def test_logit_normal(shift):
    t = logit_normal(uniform(0, "timestep", 0, torch.arange(200_000), ()), -0.2, 0.8, shift)
    z = (torch.logit(t.double()) - math.log(shift) + 0.2) / 0.8
    assert stats.kstest(z.numpy(), stats.norm.cdf).pvalue > 0.01


def test_shifting_a_draw_is_drawing_with_a_shift():
    t = shift_timesteps(logit_normal(U, -0.2, 0.8), 3.0)
    torch.testing.assert_close(t, logit_normal(U, -0.2, 0.8, 3.0), rtol=1e-12, atol=0)
    z = (torch.logit(t) - math.log(3) + 0.2) / 0.8
    assert p_value(z, stats.norm.cdf) > 0.01
    assert p_value(z + math.log(3), stats.norm.cdf) < 1e-6  # with the shift forgotten


def test_shifted_uniform_times():
    """P(t' < a) = P(t < the time that is shifted to a), a shift by 1 / s undoing one by s."""
    t = shift_timesteps(U, 3.0)
    assert p_value(t, lambda a: a / (3 - 2 * a)) > 0.01


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode(scale):
    """P(t < a) is the u whose quantile u - s (sin^2(pi u / 2) - u) is a, here by bisection."""

    def cdf(a):
        low, high = np.zeros_like(a), np.ones_like(a)
        for _ in range(45):
            u = (low + high) / 2
            below = u - scale * (np.sin(np.pi * u / 2) ** 2 - u) < a
            low, high = np.where(below, u, low), np.where(below, high, u)
        return (low + high) / 2

    assert p_value(mode(U, scale), cdf) > 0.01
    t = mode(torch.linspace(0, 1, 1001, dtype=torch.float64), scale)
    assert (t.diff() < 1e-9).all()
    torch.testing.assert_close(t[[0, -1]], t.new_tensor([1.0, 0.0]), atol=1e-15, rtol=0)


def test_mode_favours_the_middle_or_the_ends():
    shares = [((mode(U, s) - 0.5).abs() < 0.1).double().mean().item() for s in (-1, 0, 1.29)]
    assert shares[0] < shares[1] - 0.05 < shares[2] - 0.1


@pytest.mark.parametrize("scale", [-1.1, 1.8])
def test_a_scale_that_folds_time_over_is_refused(scale):
    with pytest.raises(ValueError, match=rf"in \[-1, 1.7519\], got {scale}"):
        mode(U[:3], scale)


@pytest.mark.parametrize("shift", [0, -1, math.nan, math.inf])
def test_a_shift_that_is_not_positive_is_refused(shift):
    for shifted in (shift_timesteps, lambda u, s: logit_normal(u, shift=s)):
        with pytest.raises(ValueError, match=f"a shift is positive.*got {shift:g}"):
            shifted(U[:3], shift)


@pytest.mark.parametrize("process", [FlowProcess(), TrigFlow(), VarianceExploding(), VPSDE()])
def test_log_normal_noise_levels(process):
    t = log_normal(process, U, -1.2, 1.2)
    level = (process.sigma(t) / process.alpha(t)).log()
    assert p_value(level, stats.norm(-1.2, 1.2).cdf) > 0.01


def test_log_normal_noise_is_logit_normal_time_for_a_flow():
    torch.testing.assert_close(
        log_normal(FlowProcess(), U, -0.4, 1.0), logit_normal(U, -0.4, 1.0), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("size", [1, 7, 64])
def test_each_stratum_is_hit_once(size):
    for step in range(20):
        u = stratified(U[step * size : (step + 1) * size])
        assert torch.equal((u * size).floor(), torch.arange(size, dtype=torch.float64))


def test_stratified_numbers_are_uniform_and_carry_over_to_draws():
    u = torch.cat([stratified(part) for part in U.split(50)])
    assert p_value(u, "uniform") > 0.01
    t = logit_normal(u)
    edges = logit_normal(torch.linspace(0, 1, 51, dtype=torch.float64))
    found = torch.bucketize(t.view(-1, 50), edges) - 1
    assert torch.equal(found, torch.arange(50).expand(len(found), 50))


def test_strata_lower_the_variance_of_a_batchs_mean():
    plain = (U.view(-1, 50) ** 2).mean(dim=1).var()
    spread = torch.stack([stratified(part).square().mean() for part in U.split(50)]).var()
    assert spread < plain / 500  # the variance falls as B^-3 in place of B^-1


def test_the_last_stratum_stays_below_one_in_32_bits():
    u = stratified(torch.full((4096,), 0.9999))
    assert u.dtype == torch.float32
    assert u[-1] < 1
    assert torch.special.ndtri(u[-1]).isfinite()


@pytest.mark.parametrize("process", [VarianceExploding(1.0), VPSDE(), TrigFlow(), FlowProcess()])
def test_log_normal_times_stay_within_the_process(process):
    u = torch.tensor([0.5, 0.99, 1 - 1e-12], dtype=torch.float64)
    t = log_normal(process, u, mean=3.0, std=2.0)
    assert (t <= process.end).all()
    assert t[-1] == pytest.approx(process.end, abs=1e-6)
