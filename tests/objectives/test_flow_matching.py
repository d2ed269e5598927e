import pytest
import torch
from analytic import MEAN, STD, caption, gaussian_velocity

from ldm_core.diffusion.timesteps import logit_normal
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.random import normal, uniform

N = 400_000
IDS = torch.arange(N)
X0 = MEAN + STD * normal(0, "posterior", 0, IDS, (1,)).double()
EPS = normal(0, "noise", 0, IDS, (1,)).double()
COND = caption(MEAN)


def z_score(t, floor):
    loss = flow_matching_loss(gaussian_velocity, X0, EPS, t, COND)
    assert loss.shape == (N,)
    return (loss.mean() - floor) / (loss.std() / N**0.5)


@pytest.mark.parametrize(("t", "floor"), [(0.2, 1.12360), (0.5, 0.55172), (0.8, 0.24752)])
def test_exact_network_sits_on_the_floor(t, floor):
    assert floor == pytest.approx(STD**2 / ((1 - t) ** 2 * STD**2 + t**2), abs=1e-5)
    assert abs(z_score(torch.full((N,), t, dtype=torch.float64), floor)) < 3


def test_floor_over_logit_normal_times():
    t = logit_normal(uniform(0, "timestep", 0, IDS, ()).double())
    assert abs(z_score(t, 0.61546)) < 3
    even = logit_normal((torch.arange(N, dtype=torch.float64) + 0.5) / N)
    assert (STD**2 / ((1 - even) ** 2 * STD**2 + even**2)).mean() == pytest.approx(
        0.61546, abs=2e-5
    )


def test_gradient_at_the_exact_network_is_zero_mean():
    offset = torch.zeros(N, 1, dtype=torch.float64, requires_grad=True)

    def perturbed(x_t, t, cond):
        return gaussian_velocity(x_t, t, cond) + offset

    t = torch.full((N,), 0.5, dtype=torch.float64)
    flow_matching_loss(perturbed, X0, EPS, t, COND).sum().backward()
    assert abs(offset.grad.mean()) < 3 * offset.grad.std() / N**0.5


def test_half_precision_networks_get_a_float32_loss():
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    loss = flow_matching_loss(lambda *_: half, torch.zeros(2, 3), half.float(), torch.rand(2), None)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, torch.zeros(2))
