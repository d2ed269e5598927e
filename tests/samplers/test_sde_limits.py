"""What stochastic samplers tend to: the marginal, whatever the strength of their SDE."""

from functools import partial

import numpy as np
import pytest
import torch
from covering import covering
from gaussian_probe import PROCESSES, gaussian, marginal, probe, probe_path

from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.diffusion.process import squared_diffusion
from ldm_core.samplers.ancestral import sample_dpmpp_2s_ancestral, sample_euler_ancestral
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.er_sde import sample_er_sde
from ldm_core.samplers.euler_maruyama import sample_euler_maruyama

ETAS = (0.0, 0.5, 1.0)


def maruyama(eta):
    def strength(process, t):
        return eta * squared_diffusion(process, t)

    return partial(sample_euler_maruyama, diffusion=strength)


def extrapolated(found, order):
    """To no step size, by Richardson: steps are halved, errors of `order` and the next go."""
    while len(found) > 1:
        found = found[1:] + np.diff(found, axis=0) / (2**order - 1)
        order += 1
    return found[0]


SCALERS = (torch.ones_like, torch.sqrt, lambda s: s)
FAMILIES = {
    "ancestral": (probe, 1, [partial(sample_euler_ancestral, eta=eta) for eta in ETAS]),
    "euler maruyama": (probe, 1, [maruyama(eta) for eta in ETAS]),
    "er sde": (probe, 1, [partial(sample_er_sde, stages=1, scaler=scaler) for scaler in SCALERS]),
    "2s ancestral": (probe, 2, [partial(sample_dpmpp_2s_ancestral, eta=eta) for eta in ETAS]),
    "2m sde": (probe_path, 2, [partial(sample_dpmpp_2m_sde, eta=eta) for eta in ETAS]),
    "sde": (probe_path, 2, [partial(sample_dpmpp_sde, eta=eta) for eta in ETAS]),
}
SOME = {name: PROCESSES[name] for name in ("flow", "vp sde", "ve")}


@pytest.mark.parametrize(("family", "process"), covering(FAMILIES, SOME))
def test_the_limit_does_not_depend_on_eta(family, process):
    moments, order, samples = family
    grids = [log_snr_grid(process, steps, -3.0, 3.0, to_data=False) for steps in (25, 50, 100)]
    start, exact = marginal(process, grids[0][0]), marginal(process, grids[0][-1])
    for sample in samples:
        found = np.array([moments(sample, gaussian(process), grid, start) for grid in grids])
        assert extrapolated(found, order) == pytest.approx(np.array(exact), abs=5e-5)
