import itertools

import pytest
import torch

from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, add_noise, over_dimensions
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas

PROCESSES = {
    "flow": FlowProcess(),
    "trig": TrigFlow(),
    "vp sde": VPSDE(),
    "linear": DiscreteVP(linear_betas()),
    "ve": VarianceExploding(),
}


T = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)
GENERATOR = torch.Generator().manual_seed(0)
X0, EPS = torch.randn(2, 13, 5, dtype=torch.float64, generator=GENERATOR)


def truth(process):
    def path(t):
        return add_noise(process, X0, EPS, t)

    x_t, velocity = torch.func.jvp(path, (T,), (torch.ones_like(T),))
    alpha, sigma = (over_dimensions(level(T), x_t) for level in (process.alpha, process.sigma))
    return x_t, {
        Prediction.X0: X0,
        Prediction.EPS: EPS,
        Prediction.VELOCITY: velocity,
        Prediction.V: alpha * EPS - sigma * X0,
        Prediction.SCORE: -EPS / sigma,
    }


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
@pytest.mark.parametrize(("source", "target"), itertools.product(Prediction, Prediction))
def test_every_pair(process, source, target):
    x_t, values = truth(process)
    result = convert(values[source], x_t, T, process, source, target)
    torch.testing.assert_close(result, values[target], rtol=1e-11, atol=1e-11)
    back = convert(result, x_t, T, process, target, source)
    torch.testing.assert_close(back, values[source], rtol=1e-11, atol=1e-11)


def test_flow_velocity_error_is_x0_error_over_t():
    x_t, _ = truth(FlowProcess())
    wrong = X0 + 0.1
    v = convert(wrong, x_t, T, FlowProcess(), Prediction.X0, Prediction.VELOCITY)
    torch.testing.assert_close((v - (EPS - X0)).abs(), (0.1 / T)[:, None].expand_as(v))


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_flow_velocity_gives_data_and_noise_at_both_ends(end):
    t = torch.tensor(end, dtype=torch.float64)
    x_t, v = add_noise(FlowProcess(), X0, EPS, t), EPS - X0
    for target, expected in ((Prediction.X0, X0), (Prediction.EPS, EPS)):
        result = convert(v, x_t, t, FlowProcess(), Prediction.VELOCITY, target)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
