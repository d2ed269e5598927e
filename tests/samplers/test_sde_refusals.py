"""What stochastic samplers refuse, and with which values in the message."""

from functools import partial

import pytest
import torch
from gaussian_probe import gaussian

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import karras_grid, linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.churn import sample_churn
from ldm_core.samplers.ddpm import sample_ddim_eta, sample_ddpm
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama

VE = VarianceExploding()
START = torch.zeros(5, 3, dtype=torch.float64)


def noise(k):
    return torch.zeros_like(START)


def path(t, r):
    return torch.zeros_like(START)


ETA = {
    "ddim": lambda eta: partial(sample_ddim_eta, noise=noise, eta=eta),
    "euler ancestral": lambda eta: partial(sample_euler_ancestral, noise=noise, eta=eta),
    "2s ancestral": lambda eta: partial(sample_dpmpp_2s_ancestral, noise=noise, eta=eta),
    "sde": lambda eta: partial(sample_dpmpp_sde, path=path, eta=eta),
    "2m sde": lambda eta: partial(sample_dpmpp_2m_sde, path=path, eta=eta),
}


@pytest.mark.parametrize(
    ("name", "eta"),
    [
        (name, eta)
        for name in ETA
        for eta in (-0.1, 1.5, float("nan"))
        if (name, eta) != ("2m sde", 1.5)  # the strength of that SDE has no upper end
    ],
)
def test_eta_outside_its_range_is_refused(name, eta):
    def network(x, t, cond):
        raise AssertionError("refused before any evaluation")

    denoiser = Denoiser(network, VE, Prediction.X0)
    with pytest.raises(ValueError, match=f"got {eta:g}"):
        ETA[name](eta)(denoiser, START, karras_grid(VE, 3), None)


def test_other_arguments_are_refused_with_their_values():
    denoiser, grid = gaussian(VE), karras_grid(VE, 3)
    with pytest.raises(ValueError, match="fixed_small, fixed_large, got learned"):
        sample_ddpm(denoiser, START, grid, None, noise=noise, variance="learned")
    with pytest.raises(ValueError, match="got 4"):
        sample_er_sde(denoiser, START, grid, None, noise=noise, stages=4)
    with pytest.raises(ValueError, match=r"to 80 it goes from .* to 1.8\d*e-35"):
        sample_er_sde(denoiser, START, grid, None, noise=noise, scaler=lambda s: (-s).exp())
    with pytest.raises(ValueError, match="got -1"):
        sample_churn(denoiser, START, grid, None, noise=noise, churn=-1.0)
    flow = linear_grid(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="rate of inf at t = 1"):
        sample_euler_maruyama(gaussian(FlowProcess()), START, flow, None, noise=noise)
    with pytest.raises(ValueError, match="decreases from noise to data"):
        sample_ddpm(denoiser, START, grid.flip(0), None, noise=noise)
