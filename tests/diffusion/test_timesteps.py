import math

import pytest
import torch
from scipy import stats

from ldm_core.diffusion.timesteps import linear_grid, logit_normal, shift_timesteps
from ldm_core.random import uniform


def test_shift_moves_the_logit():
    t = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(shift_timesteps(t, 3)), torch.logit(t) + math.log(3))


@pytest.mark.parametrize("shift", [1.0, 3.0, 1 / 0.3])
def test_logit_normal(shift):
    t = logit_normal(uniform(0, "timestep", 0, torch.arange(200_000), ()), -0.2, 0.8, shift)
    z = (torch.logit(t.double()) - math.log(shift) + 0.2) / 0.8
    assert stats.kstest(z.numpy(), stats.norm.cdf).pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_runs_from_noise_to_data(shift):
    grid = linear_grid(10, shift, dtype=torch.float64)
    assert grid.shape == (11,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_grid_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    torch.testing.assert_close(linear_grid(10, 3.0), scheduler.sigmas, rtol=1e-6, atol=1e-6)
