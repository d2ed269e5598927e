"""Pure noise in float32, where cos(pi / 2) is rounded to below zero."""

import math

import pytest
import torch

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.preconditioning import Preconditioned
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, half_log_snr, squared_diffusion
from ldm_core.diffusion.variance_preserving import (
    DiscreteVP,
    TrigFlow,
    scaled_linear_betas,
    zero_terminal_snr,
)
from ldm_core.objectives import weightings
from ldm_core.objectives.denoising import denoising_loss
from ldm_core.samplers.ddim import sample_ddim

PROCESSES = {
    "trig": TrigFlow(),
    "table": DiscreteVP(zero_terminal_snr(scaled_linear_betas())),
}
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def end(process):
    return torch.tensor([process.end], dtype=torch.float32)


@each
def test_there_is_no_signal_and_no_rate(process):
    assert half_log_snr(process, end(process)) == -math.inf
    assert squared_diffusion(process, end(process)) == math.inf


@each
@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "sigmoid", "edm"])
def test_losses_are_finite(process, weighting):
    x0, eps = torch.randn(2, 1, 3)
    loss = denoising_loss(
        lambda x_t, t, cond: x_t, process, Prediction.V, x0, eps, end(process), None,
        getattr(weightings, weighting),
    )  # fmt: skip
    assert loss.isfinite().all()


@each
def test_preconditioned_sampling_starts_there(process):
    network = Preconditioned(lambda x_t, t, cond: x_t, process)
    denoiser = Denoiser(network, process, Prediction.X0)
    grid = process.end * torch.linspace(1, 0, 5)
    assert sample_ddim(denoiser, torch.randn(2, 3), grid, None).isfinite().all()


@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.SCORE])
@pytest.mark.parametrize("process", [FlowProcess(), *PROCESSES.values()])
def test_noise_that_says_nothing_of_the_data_is_refused(process, prediction):
    denoiser = Denoiser(lambda x_t, t, cond: x_t, process, prediction)
    grid = process.end * torch.linspace(1, 0, 5)
    with pytest.raises(ValueError, match=f"pure noise.* predicts {prediction.value} says nothing"):
        sample_ddim(denoiser, torch.randn(2, 3), grid, None)
    assert sample_ddim(denoiser, torch.randn(2, 3), grid[1:-1], None).isfinite().all()


def test_where_pure_noise_begins():
    """alpha = 1e-6 sigma is a signal in float64, 1e-8 sigma none; so says the bound of 1e-7."""
    t = torch.tensor([1 / (1 + 1e-6), 1 / (1 + 1e-8)], dtype=torch.float64)
    signal, none = half_log_snr(FlowProcess(), t).tolist()
    assert signal == pytest.approx(math.log(1e-6), rel=1e-6)
    assert none == -math.inf
