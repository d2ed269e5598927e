import pytest
import torch
from exact_gaussian import PROCESSES, Gaussian, four_points

from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess
from ldm_core.objectives.denoising import denoising_loss, error_ratio
from ldm_core.objectives.flow_matching import flow_matching_loss

X0, EPS = four_points()
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def oracle(exact, prediction, offset=0.0):
    def network(x_t, t, cond):
        x0 = exact.x0(x_t, t)
        return convert(x0, x_t, t, exact.process, Prediction.X0, prediction) + offset

    return network


@each
@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_oracle_sits_on_the_floor_with_no_gradient(process, prediction, share):
    """The variance of what is predicted given x_t: error_ratio^2 S^2 sigma^2 / V_t."""
    exact, t = Gaussian(process), torch.full((4,), share * process.end, dtype=torch.float64)
    offset = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    network = oracle(exact, prediction, offset)
    loss = denoising_loss(network, process, prediction, X0, EPS, t, None).mean()
    _, variance = exact.moments(t, X0)
    floor = exact.std**2 * process.sigma(t)[0] ** 2 / variance[0, 0]
    ratio = error_ratio(prediction, process, t)[0]
    assert loss.item() == pytest.approx(float(ratio**2 * floor), rel=1e-12)
    loss.backward()
    assert abs(offset.grad.item()) < 1e-13 * float(1 + ratio.abs())


def test_of_a_flows_velocity_it_is_flow_matching():
    x0, eps = torch.randn(2, 6, 3, 2, 2, dtype=torch.float64)
    t = torch.rand(6, dtype=torch.float64)

    def network(x_t, t, cond):
        return torch.sin(x_t) * cond

    arguments = (x0, eps, t, 0.3)
    loss = denoising_loss(network, FlowProcess(), Prediction.VELOCITY, *arguments)
    torch.testing.assert_close(loss, flow_matching_loss(network, *arguments), rtol=0, atol=1e-15)


def test_a_flows_velocity_can_be_learnt_at_both_ends():
    t = torch.tensor([0.0, 1.0])
    x0, eps = torch.randn(2, 2, 3)
    loss = denoising_loss(lambda *_: eps - x0, FlowProcess(), Prediction.VELOCITY, x0, eps, t, None)
    torch.testing.assert_close(loss, torch.zeros(2))


def test_half_precision_networks_get_a_float32_loss():
    x0, eps, t = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2)
    loss = denoising_loss(
        lambda x_t, t, cond: x_t.bfloat16(), FlowProcess(), Prediction.X0, x0, eps, t, None
    )
    assert loss.dtype == torch.float32
