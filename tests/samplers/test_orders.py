"""Convergence on a mixture whose flow map is known: error ~ steps^-order."""

from functools import partial

import numpy as np
import pytest
import torch
from analytic import Mixture, order
from solvers import ALL

from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.diffusion.process import FlowProcess, half_log_snr
from ldm_core.diffusion.variance_preserving import VPSDE
from ldm_core.samplers import dpm_solver_multistep, exponential
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m, sample_dpmpp_3m
from ldm_core.samplers.exponential import level, moments

START, END = 0.98, 0.02
X = np.linspace(-2, 2, 41)
STEPS = {1: (40, 80), 2: (80, 160), 3: (160, 320), 4: (40, 80)}
"""By order: where errors fall as they will for ever, well above rounding."""

ORDERS = {
    "Euler": 1,
    "DDIM": 1,
    "Heun": 2,
    "DPM-Solver-2": 2,
    "DPM++ 2S": 2,
    "DPM++ 2M": 2,
    "DPM++ 2M heun": 2,
    "DEIS-2": 2,
    "UniPC-1": 2,
    "UniPC-2 predictor": 2,
    "UniPC-2": 3,
    "UniPC-2 bh1": 3,
    "DEIS-3 seeded": 3,
    "DPM++ 3M": 3,
    "RK4": 4,
}


def in_t(process, steps):
    return torch.linspace(START, END, steps + 1, dtype=torch.float64)


def in_lambda(process, steps):
    first, last = half_log_snr(process, torch.tensor([START, END], dtype=torch.float64)).tolist()
    return log_snr_grid(process, steps, first, last, to_data=False)


def errors(sample, grid_of, steps, process=FlowProcess()):
    """Largest error over the starts X sqrt(alpha^2 + sigma^2), for every number of steps."""
    mixture = Mixture(process)
    x_T = X * np.hypot(*mixture.levels(START))
    exact = mixture.flow_map(x_T, START, END)
    results = [
        sample(mixture.denoiser(), torch.from_numpy(x_T)[:, None], grid_of(process, n), None)
        for n in steps
    ]
    return [np.abs(result[:, 0].numpy() - exact).max() for result in results]


LATE = {("DEIS-2", in_t): (160, 320), ("DPM++ 3M", in_lambda): (320, 640)}
SLOW = {("DEIS-3 seeded", in_t)}  # steps in lambda are uneven there: 2.83 from 320 to 640, rising


@pytest.mark.parametrize(
    ("name", "grid_of"), [(n, g) for n in ORDERS for g in (in_t, in_lambda) if (n, g) not in SLOW]
)
def test_orders(name, grid_of):
    steps = LATE.get((name, grid_of), STEPS[ORDERS[name]])
    found = order(errors(ALL[name], grid_of, steps))
    assert found == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.parametrize("name", ["DPM-Solver-2", "DPM++ 2M", "UniPC-1", "DEIS-2"])
def test_orders_on_another_process(name):
    found = order(errors(ALL[name], in_lambda, STEPS[2], VPSDE()))
    assert found == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("grid_of", [in_t, in_lambda])
def test_unipc_3_is_of_order_3_at_least(grid_of):
    """4 once it is going, but its first steps have fewer estimates."""
    assert 3 < order(errors(ALL["UniPC-3"], grid_of, (80, 160))) < 4.15


def test_a_first_order_start_is_seen_in_the_end():
    for name in ("DPM++ 3M", "DEIS-3"):
        sample = partial(ALL[name], seeded=False)
        assert order(errors(sample, in_t, (160, 320))) < 2.5


def test_the_third_order_needs_the_whole_curvature(monkeypatch):
    """With D[0, 1, 2] for D'', as in diffusers and k-diffusion, it is of order 2."""
    monkeypatch.setattr(
        exponential,
        "moments",
        lambda h, highest: moments(h, highest) * torch.tensor([1, 1, 0.5])[: highest + 1],
    )
    assert order(errors(sample_dpmpp_3m, in_lambda, STEPS[3])) == pytest.approx(2, abs=0.15)


def test_the_second_order_needs_the_right_lambda(monkeypatch):
    """log-SNR where half of it is meant doubles the slope's weight."""
    for module in (exponential, dpm_solver_multistep):
        monkeypatch.setattr(module, "level", lambda process, t: 2 * level(process, t))
    assert order(errors(sample_dpmpp_2m, in_lambda, STEPS[2])) == pytest.approx(1, abs=0.15)
