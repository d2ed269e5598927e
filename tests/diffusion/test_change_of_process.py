"""A network of any process gives the flow's velocity: exactly, where it is the exact one."""

import pytest
import torch
from exact_gaussian import PROCESSES, Gaussian

from ldm_core.diffusion.change_of_process import flow_velocity
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, half_log_snr
from ldm_core.diffusion.variance_preserving import DiscreteVP, linear_betas, zero_terminal_snr

FLOW = FlowProcess()
# below pure noise, and above the first row of the table, under which its first step begins
T = torch.tensor([0.012, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)
X = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None] * torch.ones(1, 3, dtype=torch.float64)


def exact(process, prediction):
    """The exact network of N(m, S^2) under a process, and what it was asked."""
    gaussian, asked = Gaussian(process), []

    def network(x, t, cond):
        asked.append((x, t))
        return convert(gaussian.x0(x, t), x, t, process, Prediction.X0, prediction)

    return network, asked


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_network_of_any_process_gives_the_exact_velocity_of_the_flow(name, prediction):
    process = PROCESSES[name]
    network, asked = exact(process, prediction)
    velocity = flow_velocity(network, process, prediction, X, T, None)
    torch.testing.assert_close(velocity, Gaussian(FLOW).velocity(X, T), rtol=1e-7, atol=1e-7)
    [(x, s)] = asked  # once, at the same ratio, and with the spread of that process
    torch.testing.assert_close(half_log_snr(process, s), half_log_snr(FLOW, T))
    torch.testing.assert_close(x * ((1 - T) / process.alpha(s))[:, None], X, rtol=1e-9, atol=1e-9)


def test_a_flow_that_predicts_the_velocity_is_asked_as_it_is():
    def network(x, t, cond):
        assert x is X
        assert t is T
        return 3 * x + cond

    assert torch.equal(flow_velocity(network, FLOW, Prediction.VELOCITY, X, T, 2), 3 * X + 2)


def test_beyond_the_end_of_a_table_it_is_asked_at_its_end():
    process = PROCESSES["linear"]
    network, asked = exact(process, Prediction.EPS)
    t = torch.tensor([0.995, 1.0], dtype=torch.float64)
    velocity = flow_velocity(network, process, Prediction.EPS, X[:2], t, None)
    [(x, s)] = asked
    assert s.tolist() == [1.0, 1.0]
    torch.testing.assert_close(x[1], X[1])  # pure noise is of unit variance in both
    assert velocity.isfinite().all()
    # what is left of the signal there, .0063, is not in the state: an error of that order
    assert (velocity - Gaussian(FLOW).velocity(X[:2], t)).abs().max() < 0.02


def test_a_table_without_signal_at_its_end_is_exact_at_pure_noise():
    process = DiscreteVP(zero_terminal_snr(linear_betas()))
    network, _ = exact(process, Prediction.V)
    t = torch.ones(5, dtype=torch.float64)
    velocity = flow_velocity(network, process, Prediction.V, X, t, None)
    torch.testing.assert_close(velocity, Gaussian(FLOW).velocity(X, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.V, Prediction.X0])
def test_gradients_are_those_of_the_velocity(prediction):
    """By the mean of the data, which the network has learnt, and by the state."""
    process = PROCESSES["linear"]
    mean, x = torch.tensor(0.7, dtype=torch.float64), X.clone()
    known = (mean.requires_grad_(), x.requires_grad_())
    there, here = Gaussian(process, mean), Gaussian(FLOW, mean)

    def network(x, t, cond):
        return convert(there.x0(x, t), x, t, process, Prediction.X0, prediction)

    velocity = flow_velocity(network, process, prediction, x, T, None)
    ours = torch.autograd.grad(velocity.square().sum(), known)
    theirs = torch.autograd.grad(here.velocity(x, T).square().sum(), known)
    for mine, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_the_state_keeps_its_dtype():
    process = PROCESSES["linear"]
    seen = []

    def network(x, t, cond):
        seen.append(x.dtype)
        return x

    t = T.float()
    out = flow_velocity(network, process, Prediction.EPS, X.bfloat16(), t, None)
    assert (out.dtype, *seen) == (torch.bfloat16, torch.bfloat16)
