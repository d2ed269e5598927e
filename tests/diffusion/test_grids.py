import pytest
import torch

from ldm_core.diffusion.grids import (
    check_grid,
    karras_grid,
    linear_grid,
    log_snr_grid,
    table_grid,
)
from ldm_core.diffusion.process import FlowProcess, half_log_snr
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import DiscreteVP, linear_betas, scaled_linear_betas


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_linear_runs_from_noise_to_data(shift):
    grid = linear_grid(10, shift, dtype=torch.float64)
    assert grid.shape == (11,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_linear_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    torch.testing.assert_close(linear_grid(10, 3.0), scheduler.sigmas, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", [FlowProcess(), VarianceExploding()])
def test_log_snr_is_equally_spaced(process):
    grid = log_snr_grid(process, 8, -3.0, 4.0, to_data=False)
    expected = torch.linspace(-3, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(half_log_snr(process, grid), expected)
    assert torch.equal(log_snr_grid(process, 9, -3.0, 4.0)[:-1], grid)
    assert log_snr_grid(process, 9, -3.0, 4.0)[-1] == 0
    with pytest.raises(ValueError, match="first 4 < last -3"):
        log_snr_grid(process, 8, 4.0, -3.0)


def test_karras_matches_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(12)
    ours = karras_grid(VarianceExploding(), 12)
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="0 < low < high, got 3 and 1"):
        karras_grid(VarianceExploding(), 12, 3, 1)


def test_karras_is_of_noise_over_signal():
    process = DiscreteVP(scaled_linear_betas())
    grid = karras_grid(process, 10, 0.03, 14.0)[:-1]
    ratio = process.sigma(grid) / process.alpha(grid)
    steps = (ratio ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_tables_are_walked_as_diffusers_walks_them(spacing, steps):
    diffusers = pytest.importorskip("diffusers")
    process = DiscreteVP(linear_betas())
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = table_grid(process, steps, spacing)
    assert process.step_of(grid[:-1]).round().long().tolist() == scheduler.timesteps.tolist()
    assert grid[-1] == 0


def test_a_table_has_only_so_many_steps():
    with pytest.raises(ValueError, match="1001 steps over a table of 1000 rows"):
        table_grid(DiscreteVP(linear_betas()), 1001)


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="trailing, leading, linspace, got logarithmic"):
        table_grid(DiscreteVP(linear_betas()), 10, "logarithmic")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1.0], "at least 2"),
        ([1.0, 0.5, 0.5, 0.0], "0.5 is followed by 0.5"),
        ([0.0, 1.0], "0 is followed by 1"),
        ([2.0, 0.0], r"in \[0, 1\], this grid runs from 2 to 0"),
        ([1.0, -0.1], r"in \[0, 1\], this grid runs from 1 to -0.1"),
    ],
)
def test_what_is_no_grid_is_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        check_grid(torch.tensor(grid), FlowProcess())
    check_grid(linear_grid(3), FlowProcess())


@pytest.mark.parametrize("steps", [0, -1])
def test_a_grid_without_steps_is_refused(steps):
    flow = FlowProcess()
    for make in (
        linear_grid, lambda n: karras_grid(flow, n), lambda n: log_snr_grid(flow, n, -1.0, 1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"at least 1 step, got {steps}"):
            make(steps)
