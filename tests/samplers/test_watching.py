"""What a caller sees of a sampler: events, evaluations, and refusals."""

import pytest
import torch
from analytic import Mixture
from solvers import ALL

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_preserving import VPSDE
from ldm_core.samplers.deis import sample_deis
from ldm_core.samplers.unipc import sample_unipc

X = torch.linspace(-2, 2, 5)[:, None]


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_watching_changes_nothing(name, dtype):
    denoiser, grid, events = Mixture().denoiser(), linear_grid(5), []
    denoiser = Denoiser(
        lambda x, t, c: Mixture().x0(x, t, c).to(dtype), FlowProcess(), Prediction.X0
    )
    x_T = X.to(dtype)
    result = ALL[name](denoiser, x_T, grid, None, events.append)
    assert torch.equal(result, ALL[name](denoiser, x_T, grid, None))
    assert result.dtype == dtype
    assert [event.index for event in events] == list(range(5))
    assert torch.equal(torch.stack([event.t for event in events]), grid[:-1])
    assert torch.equal(events[0].x_t, x_T)
    for event in events[1:]:
        torch.testing.assert_close(event.x0, denoiser.denoise(event.x_t, event.t, None))
    torch.testing.assert_close(events[-1].x0, result)  # the last step goes to the estimate


@pytest.mark.parametrize("name", ALL)
def test_a_watcher_may_stop_it(name):
    seen = []

    def stop_at_two(event):
        seen.append(event.index)
        if event.index == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        ALL[name](Mixture().denoiser(), X.double(), linear_grid(5), None, stop_at_two)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("first", [1.0, 0.98])
def test_evaluations_are_as_many_as_promised(name, first):
    """And none at t = 0, where a network need not know anything."""
    times = []

    def network(x_t, t, cond):
        times.append(float(t[0]))
        return Mixture().x0(x_t, t, cond)

    n = 6
    grid = torch.linspace(first, 0, n + 1, dtype=torch.float64)
    ALL[name](Denoiser(network, FlowProcess(), Prediction.X0), X.double(), grid, None)
    from_noise = first == 1
    expected = {
        "Heun": 2 * n - 1,
        "RK4": 4 * n - 3,
        "DPM-Solver-2": 2 * n - 1 - from_noise,
        "DPM++ 2S": 2 * n - 1 - from_noise,
        "DPM++ 3M": n + 1 - from_noise,
        "DEIS-3 seeded": n + 1 - from_noise,
    }
    assert len(times) == expected.get(name, n)
    assert min(times) > 0


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_grid_is_refused(name):
    with pytest.raises(ValueError, match="0 is followed by 1"):
        ALL[name](Mixture().denoiser(), X, torch.tensor([0.0, 1.0]), None)
    with pytest.raises(ValueError, match="1 is followed by nan"):
        ALL[name](Mixture().denoiser(), X, torch.tensor([1.0, torch.nan, 0.0]), None)
    with pytest.raises(ValueError, match="at least 2"):
        ALL[name](Mixture().denoiser(), X, torch.tensor([1.0]), None)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("process", [FlowProcess(), VPSDE()], ids=["flow", "vp sde"])
def test_states_of_16_bits_stay_so(name, process):
    x_T = X.bfloat16()
    denoiser = Denoiser(lambda x_t, t, cond: x_t.bfloat16() / 2, process, Prediction.X0)
    result = ALL[name](denoiser, x_T, linear_grid(4) * process.end, None)
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()


@pytest.mark.parametrize("sample", [sample_unipc, sample_deis])
def test_order_zero_is_refused(sample):
    with pytest.raises(ValueError, match="order 1 and above .*got 0"):
        sample(Mixture().denoiser(), X, linear_grid(4), None, order=0)


@pytest.mark.parametrize("name", ALL)
def test_gradients_flow(name):
    x_T = X.double().requires_grad_()
    ALL[name](Mixture().denoiser(), x_T, linear_grid(4), None).sum().backward()
    assert x_T.grad.isfinite().all()
