import numpy as np
import pytest
import torch
from analytic import Mixture

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.optimised_grid import optimised_grid, refined
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.samplers.ddim import sample_ddim
from ldm_core.samplers.dpm_solver_multistep import sample_dpmpp_2m
from ldm_core.samplers.heun import sample_heun

CANDIDATES = linear_grid(33, dtype=torch.float64)


def quantiles(count):
    """Standard normal starts, spread evenly."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(u)[:, None]


def error(sample, grid):
    """Root mean square over starts that no grid was made on, against the exact map."""
    x_T = quantiles(101)
    exact = Mixture().flow_map(x_T[:, 0].numpy(), 1.0, 0.0)
    result = sample(Mixture().denoiser(), x_T, grid, None)[:, 0].numpy()
    return np.sqrt(np.mean((result - exact) ** 2))


@pytest.mark.parametrize(
    ("sample", "steps", "share"),
    [
        *((sample_ddim, steps, 1.0) for steps in range(5, 11)),  # equal steps suit it on a flow
        (sample_heun, 8, 0.7),
        (sample_dpmpp_2m, 5, 0.6),
        (sample_dpmpp_2m, 10, 0.6),
    ],
)
def test_beats_equal_steps(sample, steps, share):
    """On other starts than those it was made on, by the share of the error that is left."""
    grid = optimised_grid(Mixture().denoiser(), quantiles(64), CANDIDATES, steps, None, sample)
    uniform = linear_grid(steps, dtype=torch.float64)
    assert error(sample, grid) < share * error(sample, uniform)


def test_the_ends_are_kept_and_mistakes_refused():
    denoiser, few = Mixture().denoiser(), linear_grid(4, dtype=torch.float64)
    grid = optimised_grid(denoiser, quantiles(4), few, 3, None, sample_ddim)
    assert grid.shape == (4,)
    assert set(grid.tolist()) <= set(few.tolist())
    assert (grid[0], grid[-1]) == (1, 0)
    assert torch.equal(optimised_grid(denoiser, quantiles(4), few, 4, None, sample_ddim), few)
    with pytest.raises(ValueError, match="5 steps through 5 candidates"):
        optimised_grid(denoiser, quantiles(4), few, 5, None, sample_ddim)


def test_refined_keeps_the_grid():
    grid = torch.tensor([1.0, 0.25, 0.0])
    assert refined(grid, 3).tolist() == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0.25 * 2 / 3, 0.25 / 3, 0]
    )


def test_the_truth_is_a_run_of_four_times_as_many_steps():
    """The model is asked at every quarter of every step between candidates, DDIM at these alone."""
    asked = set()

    def network(x_t, t, cond):
        asked.add(round(float(t[0]), 9))
        return Mixture().x0(x_t, t, cond)

    denoiser = Denoiser(network, FlowProcess(), Prediction.X0)
    candidates = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=torch.float64)
    optimised_grid(denoiser, quantiles(4), candidates, 2, None, sample_ddim)
    quarters = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05]
    assert set(quarters) <= asked
