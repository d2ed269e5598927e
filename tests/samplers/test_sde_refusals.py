"""What stochastic samplers refuse, and with which values in the message."""

import inspect
import math
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
from ldm_core.samplers.er_sde import er_sde_5, sample_er_sde
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


def test_churn_adds_no_more_than_root_two():
    """However much is asked for, a level rises to at most sqrt 2 of itself (Algorithm 2)."""
    times = []

    def network(x_t, t, cond):
        times.append(float(t[0]))
        return x_t / 2

    grid = torch.tensor([8.0, 0.0], dtype=torch.float64)
    sample_churn(Denoiser(network, VE, Prediction.X0), START, grid, None, noise=noise, churn=99.0)
    assert times == pytest.approx([8 * 2**0.5])


def test_the_fifth_scaler_of_er_sde_is_the_papers():
    """phi(s) = s (e^(s^0.3) + 10), here through logarithms."""
    s = torch.tensor([0.0, 0.01, 1.0, 14.6, 80.0], dtype=torch.float64)
    expected = [11.0, *(math.exp(math.exp(0.3 * math.log(v))) + 10 for v in s[1:].tolist())]
    assert er_sde_5(s).tolist() == pytest.approx(expected, rel=1e-13)
    assert float(er_sde_5(s[2])) == pytest.approx(12.718281828459045, rel=1e-15)
    assert inspect.signature(sample_er_sde).parameters["scaler"].default is er_sde_5
