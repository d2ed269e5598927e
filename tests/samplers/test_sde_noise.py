from itertools import pairwise

import pytest
import torch
from analytic import order
from covering import covering
from gaussian_probe import PROCESSES, gaussian, marginal, strong_difference

from ldm_core import random
from ldm_core.diffusion.grids import log_snr_grid
from ldm_core.samplers.dpm_solver_sde import sample_dpmpp_2m_sde, sample_dpmpp_sde
from ldm_core.samplers.noise import BrownianPath, counter_noise

IDS = torch.tensor([3, 11, 42, 7])


def time(value):
    return torch.tensor(value, dtype=torch.float64)


def test_draws_are_a_function_of_seed_draw_and_sample():
    noise = counter_noise(5, IDS, (2, 3))
    assert noise(0).shape == (4, 2, 3)
    assert torch.equal(noise(4), noise(4))
    assert torch.equal(counter_noise(5, IDS[2:], (2, 3))(4), noise(4)[2:])
    assert not torch.equal(noise(4), noise(5))
    assert not torch.equal(noise(4), counter_noise(6, IDS, (2, 3))(4))


@pytest.mark.parametrize("end", [1.0, 80.0])
def test_a_path_has_the_covariance_of_brownian_motion(monkeypatch, end):
    """Exactly: each node's draw is a unit vector, so an increment is its row of coefficients.

    Cov(W_b - W_a, W_d - W_c) is the length of what [a, b] and [c, d] share.
    """
    depth = 5

    def unit(seed, stream, node, ids, shape):
        row = torch.zeros(1, 2**depth)
        row[0, node] = 1
        return row

    monkeypatch.setattr(random, "normal", unit)
    path = BrownianPath(0, torch.zeros(1), (2**depth,), end, depth)
    cells = [(a, b) for b in range(1, 2**depth + 1) for a in range(b)][::7]
    rows = torch.cat([path(time(b), time(a)) for a, b in _scaled(cells, end / 2**depth)])
    low, high = torch.tensor(cells, dtype=torch.float64).T
    shared = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    length = high - low
    expected = shared.clamp(min=0) / (length[:, None] * length).sqrt()
    torch.testing.assert_close((rows @ rows.T).double(), expected, rtol=0, atol=1e-6)


def _scaled(cells, unit):
    return [(a * unit, b * unit) for a, b in cells]


def test_increments_add_up():
    path = BrownianPath(1, IDS, (3,), 80.0)
    knots = [80.0, 61.7, 3.2, 0.25, 0.002, 0.0]
    parts = sum((t - r) ** 0.5 * path(time(t), time(r)) for t, r in pairwise(knots))
    torch.testing.assert_close(parts, 80**0.5 * path(time(80.0), time(0.0)), rtol=0, atol=1e-3)


def test_a_path_is_a_function_of_seed_and_sample():
    path = BrownianPath(1, IDS, (2, 3), 1.0)
    t, r = time(0.7), time(0.31)
    z = path(t, r)
    assert (z.shape, z.dtype) == ((4, 2, 3), torch.float32)
    assert torch.equal(BrownianPath(1, IDS[1:], (2, 3), 1.0)(t, r), z[1:])
    assert not torch.equal(BrownianPath(2, IDS, (2, 3), 1.0)(t, r), z)


def test_increments_of_a_path_are_standard_normal():
    """Of 20,000 samples; the deviations are those of five standard errors."""
    path = BrownianPath(0, torch.arange(20_000), (), 1.0)
    z = torch.stack([path(time(t), time(t - 0.1 * t)) for t in (0.9, 0.5, 0.01)])
    assert z.mean(dim=1).abs().max() < 5 / 20_000**0.5
    assert (z.var(dim=1) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


def test_times_a_path_cannot_serve_are_refused():
    path = BrownianPath(0, IDS, (2,), 1.0, depth=4)
    with pytest.raises(ValueError, match=r"from 0.5 to 0.51: .* depth larger"):
        path(time(0.51), time(0.5))
    with pytest.raises(ValueError, match=r"from 0.5 to 0.2"):
        path(time(0.2), time(0.5))
    with pytest.raises(ValueError, match=r"covers \[0, 1\], not 1.5"):
        path(time(1.5), time(0.5))
    with pytest.raises(ValueError, match="depth of 33"):
        BrownianPath(0, IDS, (2,), 1.0, depth=33)


@pytest.mark.parametrize(
    ("sample", "one_path", "expected"),
    [
        (sample_dpmpp_2m_sde, True, 1.0),
        (sample_dpmpp_sde, True, 1.0),
        (sample_dpmpp_2m_sde, False, 0.0),
    ],
)
def test_finer_grids_follow_the_same_path(sample, one_path, expected):
    """Strong order 1: there is one result to near, sample by sample. With another path for every
    grid (mutation) there is none.
    """
    process, ids = PROCESSES["flow"], torch.arange(100)
    x_T = random.normal(0, "start", 0, ids, (4,)).double()
    results = []
    for steps in (8, 16, 32, 64):
        grid = log_snr_grid(process, steps, first=-2.0, last=2.0, to_data=False)
        path = BrownianPath(0 if one_path else steps, ids, (4,), process.end, depth=10)
        results.append(sample(gaussian(process), x_T, grid, None, path=path))
    errors = [float((fine - coarse).square().mean().sqrt()) for coarse, fine in pairwise(results)]
    assert order(errors) == pytest.approx(expected, abs=0.25)


SAMPLERS = {"2m sde": sample_dpmpp_2m_sde, "sde": sample_dpmpp_sde}
SOME = {name: PROCESSES[name] for name in ("flow", "vp sde", "ve")}


@pytest.mark.parametrize(("sample", "process"), covering(SAMPLERS, SOME))
def test_strong_order_on_every_process(sample, process):
    """The same without draws: exact root mean squares, on grids fine enough for a closer bound."""
    grids = [log_snr_grid(process, n, -2.0, 2.0, to_data=False) for n in (64, 128, 256)]
    start = marginal(process, grids[0][0])
    errors = [strong_difference(sample, gaussian(process), two, start) for two in pairwise(grids)]
    assert order(errors) == pytest.approx(1, abs=0.15)
