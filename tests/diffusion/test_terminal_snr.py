"""What starting from N(0, 1) does to a process that does not end there."""

import pytest
import torch
from exact_gaussian import Gaussian

from ldm_core.diffusion.variance_preserving import (
    DiscreteVP,
    TrigFlow,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from ldm_core.samplers.heun import sample_heun

MEAN, STD = 0.5, 0.3
END = torch.ones((), dtype=torch.float64)


def sampled_mean(process):
    """What Heun's method makes of 0 is the mean of what it makes of N(0, 1), as it is affine here.

    On the circle a trajectory is a function of the angle, which is time for TrigFlow.
    """
    exact = Gaussian(TrigFlow(), MEAN, STD)
    angle = torch.atan2(process.sigma(END), process.alpha(END))
    grid = angle * torch.linspace(1, 0, 401, dtype=torch.float64)
    return sample_heun(exact, torch.zeros(1, 1, dtype=torch.float64), grid, None).item()


@pytest.mark.parametrize(
    ("betas", "known"), [(linear_betas(), 0.49905), (scaled_linear_betas(), 0.48974)]
)
def test_the_mean_is_pulled_towards_zero_by_what_signal_is_left(betas, known):
    """m (1 - alpha_T S / sqrt(V_T)): sampling starts from N(0, 1), not from N(alpha_T m, V_T)."""
    process = DiscreteVP(betas)
    alpha, sigma = process.alpha(END), process.sigma(END)
    bias = alpha * STD / (alpha**2 * STD**2 + sigma**2).sqrt()
    expected = (MEAN * (1 - bias)).item()
    assert expected == pytest.approx(known, abs=5e-6)
    assert sampled_mean(process) == pytest.approx(expected, abs=1e-5)


def test_without_signal_at_the_end_there_is_no_bias():
    process = DiscreteVP(zero_terminal_snr(scaled_linear_betas()))
    assert sampled_mean(process) == pytest.approx(MEAN, abs=1e-5)
