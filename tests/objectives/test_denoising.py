import pytest
import torch
from exact_gaussian import PROCESSES, Gaussian, four_points

from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess
from ldm_core.objectives import weightings
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


FLOW = FlowProcess()
LIMITS = [
    (Prediction.X0, 0.0, weightings.min_snr, 5.0),
    (Prediction.X0, 0.0, weightings.uniform, 1.0),
    (Prediction.X0, 1.0, weightings.min_snr, 0.0),
    (Prediction.EPS, 0.0, weightings.snr, 1.0),
    (Prediction.EPS, 0.0, weightings.min_snr, 0.0),
    (Prediction.EPS, 1.0, weightings.snr, 1.0),
    (Prediction.EPS, 1.0, weightings.min_snr, 1.0),
    (Prediction.EPS, 1.0, weightings.soft_min_snr, 1.0),
    (Prediction.EPS, 1.0, weightings.sigmoid, 1.0),
    (Prediction.VELOCITY, 0.0, weightings.flow, 1.0),
    (Prediction.VELOCITY, 1.0, weightings.flow, 1.0),
    (Prediction.V, 0.0, weightings.snr_plus_one, 1.0),
    (Prediction.SCORE, 1.0, weightings.snr, 1.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("prediction", "t", "weighting", "limit"), LIMITS)
def test_at_the_ends_a_weighting_counts_as_near_them(prediction, t, weighting, limit, dtype):
    """The weight's limit, by hand, times the plain loss."""
    x0, eps = X0.to(dtype), EPS.to(dtype)
    arguments = (lambda x_t, *_: x_t.cos(), FLOW, prediction, x0, eps)
    times = torch.full((4,), t, dtype=dtype)
    plain = denoising_loss(*arguments, times, None)
    weighted = denoising_loss(*arguments, times, None, weighting)
    assert weighted.dtype == dtype
    torch.testing.assert_close(weighted, limit * plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("prediction", "t", "weighting"),
    [
        (Prediction.X0, 0.0, weightings.snr),
        (Prediction.EPS, 1.0, weightings.uniform),
        (Prediction.EPS, 1.0, weightings.edm),
    ],
)
def test_a_weight_without_end_is_refused(prediction, t, weighting):
    times = torch.full((4,), t, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"t = {t:g} {weighting.__name__} .* in {prediction}"):
        denoising_loss(lambda x, *_: x, FLOW, prediction, X0, EPS, times, None, weighting)
