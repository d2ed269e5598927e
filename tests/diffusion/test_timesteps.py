import math

import pytest
import torch
from scipy import stats

from ldm_core.diffusion.timesteps import logit_normal, shift_timesteps
from ldm_core.random import uniform


def test_shift_moves_the_logit():
    t = torch.rand(100, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(shift_timesteps(t, 3)), torch.logit(t) + math.log(3))


@pytest.mark.parametrize("shift", [1.0, 3.0, 1 / 0.3])
def test_logit_normal(shift):
    t = logit_normal(uniform(0, "timestep", 0, torch.arange(200_000), ()), -0.2, 0.8, shift)
    z = (torch.logit(t.double()) - math.log(shift) + 0.2) / 0.8
    assert stats.kstest(z.numpy(), stats.norm.cdf).pvalue > 0.01
