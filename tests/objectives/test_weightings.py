import math
from functools import partial

import pytest
import torch
from exact_gaussian import PROCESSES

from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, half_log_snr
from ldm_core.diffusion.variance_preserving import DiscreteVP, linear_betas
from ldm_core.objectives import weightings
from ldm_core.objectives.denoising import denoising_loss

GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn(2, 20, 3, dtype=torch.float64, generator=GENERATOR)
U = torch.linspace(0.03, 0.97, 20, dtype=torch.float64)
LEVELS = torch.linspace(-8, 8, 33, dtype=torch.float64)
WEIGHTINGS = {
    "uniform": weightings.uniform,
    "snr": weightings.snr,
    "snr + 1": weightings.snr_plus_one,
    "truncated": weightings.truncated_snr,
    "flow": weightings.flow,
    "min": weightings.min_snr,
    "soft min": weightings.soft_min_snr,
    "sigmoid": weightings.sigmoid,
    "edm": partial(weightings.edm, sigma_data=0.5),
}
on_the_circle = pytest.mark.parametrize("name", ["trig", "vp sde", "linear"])


def head(process, prediction):
    """One and the same wrong estimate of x0, as a network that predicts something else."""

    def network(x_t, t, cond):
        estimate = torch.sin(3 * x_t) + 0.2
        return convert(estimate, x_t, t, process, Prediction.X0, prediction)

    return network


def losses(process, prediction, weighting=None):
    t = U * process.end
    network = head(process, prediction)
    return denoising_loss(network, process, prediction, X0, EPS, t, None, weighting)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
def test_a_weighting_means_the_same_for_every_prediction(process, prediction, weighting):
    torch.testing.assert_close(
        losses(process, prediction, weighting),
        losses(process, Prediction.X0, weighting),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_of_the_estimate_of_data_the_weight_is_the_weighting(process):
    level = half_log_snr(process, U * process.end)
    expected = weightings.min_snr(level) * losses(process, Prediction.X0)
    weighted = losses(process, Prediction.X0, weightings.min_snr)
    torch.testing.assert_close(weighted, expected, rtol=1e-14, atol=0)


@on_the_circle
def test_losses_on_the_circle_differ_by_the_snr(name):
    process = PROCESSES[name]
    ratio = weightings.snr(half_log_snr(process, U * process.end))
    data = losses(process, Prediction.X0)
    for prediction, factor in ((Prediction.EPS, ratio), (Prediction.V, ratio + 1)):
        torch.testing.assert_close(losses(process, prediction), factor * data, rtol=1e-11, atol=0)


def test_flow_losses_differ_by_the_square_of_time():
    process = FlowProcess()
    velocity, data = (losses(process, p) for p in (Prediction.VELOCITY, Prediction.X0))
    torch.testing.assert_close(velocity, data / U**2, rtol=1e-12, atol=0)
    as_flow = losses(process, Prediction.X0, weightings.flow)
    torch.testing.assert_close(as_flow, velocity, rtol=1e-12, atol=0)


@on_the_circle
def test_min_snr_per_prediction(name):
    """min(SNR, g) times 1, 1 / SNR and 1 / (SNR + 1) of each prediction's own error."""
    process = PROCESSES[name]
    ratio = weightings.snr(half_log_snr(process, U * process.end))
    for prediction, divisor in (
        (Prediction.X0, torch.ones_like(ratio)),
        (Prediction.EPS, ratio),
        (Prediction.V, ratio + 1),
    ):
        weight = losses(process, prediction, weightings.min_snr) / losses(process, prediction)
        torch.testing.assert_close(weight, ratio.clamp(max=5) / divisor, rtol=1e-11, atol=0)


def test_snr_is_diffusers():
    signal = pytest.importorskip("diffusers").DDPMScheduler().alphas_cumprod
    process = DiscreteVP(linear_betas())
    rows = torch.arange(1000, dtype=torch.float64)
    ours = weightings.snr(half_log_snr(process, process.time_of_step(rows)))
    theirs = signal / (1 - signal)  # in float32
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=0)


def test_relatives():
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=0)
    for bias in (-3.0, 0.0, 2.0):
        of_eps = (bias - 2 * LEVELS).sigmoid()
        close(weightings.sigmoid(LEVELS, bias), (2 * LEVELS).exp() * of_eps)
        close(
            weightings.sigmoid(LEVELS, bias),
            weightings.soft_min_snr(LEVELS, math.exp(bias)),
        )
    close(weightings.edm(LEVELS), weightings.snr_plus_one(LEVELS))
    close(
        weightings.truncated_snr(LEVELS),
        torch.maximum(weightings.snr(LEVELS), weightings.uniform(LEVELS)),
    )


def test_the_soft_minimum_lies_below_the_hard_one_and_meets_it_at_the_ends():
    soft, hard = weightings.soft_min_snr(LEVELS, 5.0), weightings.min_snr(LEVELS, 5.0)
    assert (soft < hard).all()
    assert (hard[[0, -1]] / soft[[0, -1]] - 1).max() < 1e-6
    middle = torch.tensor(math.log(5) / 2, dtype=torch.float64)  # SNR = 5, half of the minimum
    assert weightings.soft_min_snr(middle, 5.0).item() == pytest.approx(2.5)


@pytest.mark.parametrize("name", ["uniform", "min", "soft min", "sigmoid"])
def test_bounded_weightings_are_finite_at_pure_data_and_pure_noise(name):
    ends = torch.tensor([math.inf, -math.inf])
    assert WEIGHTINGS[name](ends).isfinite().all()
