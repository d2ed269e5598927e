import pytest
import torch
from analytic import caption, gaussian_average_velocity, gaussian_map

from ldm_core.diffusion.flow_map import FlowMap
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.samplers.flow_map import sample_flow_map

COND = caption(0.7, batch=4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_exact_in_any_number_of_steps(steps):
    x_T = torch.randn(4, 3, dtype=torch.float64)
    grid = linear_grid(steps, 2.0, torch.float64)
    result = sample_flow_map(gaussian_average_velocity, x_T, grid, COND)
    exact = gaussian_map(x_T, grid[0], grid[-1], COND)
    torch.testing.assert_close(result, exact, rtol=0, atol=1e-14)


def test_events_estimate_the_data():
    events = []
    x_T = torch.randn(4, 3, dtype=torch.float64)
    result = sample_flow_map(
        gaussian_average_velocity, x_T, linear_grid(2, dtype=torch.float64), COND, events.append
    )
    assert [float(event.t) for event in events] == [1.0, 0.5]
    assert torch.equal(events[-1].x0, result)


def test_a_network_gets_a_time_per_sample():
    def network(x_t, t, cond, r):
        assert t.shape == r.shape == (4,)
        return gaussian_average_velocity(x_t, t, r, cond)

    x_T = torch.randn(4, 3, dtype=torch.float64)
    grid = linear_grid(1, dtype=torch.float64)
    result = sample_flow_map(FlowMap(network), x_T, grid, COND)
    torch.testing.assert_close(result, gaussian_map(x_T, grid[0], grid[1], COND))


def test_times_outside_the_process_are_refused():
    x_T = torch.randn(4, 3, dtype=torch.float64)
    for times in ([2.0, -1.0], [2.0, 0.0], [1.0, -0.5]):
        grid = torch.tensor(times, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"times lie in \[0, 1\], this grid runs from"):
            sample_flow_map(gaussian_average_velocity, x_T, grid, COND)
    grid = torch.tensor([80.0, 0.0])
    sample_flow_map(lambda x, t, r, c: x, x_T, grid, None, process=VarianceExploding())
