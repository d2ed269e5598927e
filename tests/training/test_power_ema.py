import numpy as np
import pytest
import torch
from torch import nn

from ldm_core.training.power_ema import (
    PowerEma,
    combine_snapshots,
    power_exponent,
    profile_products,
    snapshot_shares,
)


class Scalar(nn.Module):
    """One weight, and a counter as batch norm has it."""

    def __init__(self, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(3))

    def at(self, value):
        self.weight.data.fill_(value)
        return self


def profile(time, exponent, grid):
    return np.where(grid <= time, (exponent + 1) / time * (grid / time) ** exponent, 0)


def test_exponents_of_the_usual_widths():
    assert power_exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    assert power_exponent(0.05) == pytest.approx(16.97, abs=5e-3)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25])
def test_the_profile_has_the_width_asked_for(std):
    exponent = power_exponent(std)
    s = (np.arange(200_000) + 0.5) / 200_000
    p = profile(1.0, exponent, s) / len(s)
    mean = (p * s).sum()
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert np.sqrt((p * (s - mean) ** 2).sum()) == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_impossible_widths_are_refused(std):
    with pytest.raises(ValueError, match=rf"between 0 and 0.2887, a plain mean, got {std:g}"):
        power_exponent(std)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_power_of_time_keeps_its_share(power):
    """theta = k^p averages to (g + 1) / (g + 1 + p) k^p: .88814 for g = 6.94 and p = 1."""
    steps, network, g = 20_000, Scalar(), 6.94
    ema = PowerEma(network, 0.10)
    assert ema.exponent == pytest.approx(g, abs=5e-3)
    ema.exponent = g
    for k in range(1, steps + 1):
        ema.update(network.at(k**power))
    share = ema.state_dict()["weight"].item() / steps**power
    assert share == pytest.approx((g + 1) / (g + 1 + power), abs=1e-4)
    if power == 1.0:
        assert (g + 1) / (g + 2) == pytest.approx(0.88814, abs=5e-6)
        assert share == pytest.approx(0.88817, abs=5e-6)  # of 20,000 discrete steps


def test_the_initial_weights_are_forgotten_at_once():
    ema = PowerEma(Scalar(100.0), 0.10)
    ema.update(Scalar(2.0))
    assert ema.state_dict()["weight"].item() == 2.0
    assert ema.state_dict()["count"].item() == 3


def test_restored_it_goes_on():
    whole, first = PowerEma(Scalar(), 0.05), PowerEma(Scalar(), 0.05)
    for k in range(10):
        whole.update(Scalar(k**0.5))
        if k == 5:
            again = PowerEma(Scalar(), 0.05)
            again.load_state_dict(first.state_dict(), first.updates)
            first = again
        first.update(Scalar(k**0.5))
    assert torch.equal(whole.state_dict()["weight"], first.state_dict()["weight"])


def test_products_of_profiles_are_their_integrals():
    times = torch.tensor([0.4, 0.7, 1.0, 1.0], dtype=torch.float64)
    exponents = torch.tensor([3.0, 17.0, 7.0, 17.0], dtype=torch.float64)
    products = profile_products(times, exponents, times, exponents)
    grid = (np.arange(100_000) + 0.5) / 100_000
    pairs = zip(times.tolist(), exponents.tolist(), strict=True)
    rows = np.stack([profile(t, g, grid) for t, g in pairs])
    numeric = torch.from_numpy(rows @ rows.T / len(grid))
    torch.testing.assert_close(products, numeric, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(products, products.T)


STEPS, SNAPSHOTS = 4096, 16
TIMES = torch.arange(1, SNAPSHOTS + 1, dtype=torch.float64).repeat(2) * (STEPS // SNAPSHOTS)
EXPONENTS = torch.tensor([power_exponent(0.05), power_exponent(0.10)]).double()
EXPONENTS = EXPONENTS.repeat_interleave(SNAPSHOTS)


def relative_error(std, shares=None):
    """||sum of shares of profiles - wanted|| / ||wanted||."""
    g = power_exponent(std)
    if shares is None:
        shares = snapshot_shares(TIMES, EXPONENTS, STEPS, g)
    wanted = torch.tensor([[STEPS], [g]], dtype=torch.float64)
    among = profile_products(TIMES, EXPONENTS, TIMES, EXPONENTS)
    across = profile_products(TIMES, EXPONENTS, wanted[0], wanted[1])[:, 0]
    itself = profile_products(wanted[0], wanted[1], wanted[0], wanted[1])[0, 0]
    square = 1 + (shares @ among @ shares - 2 * shares @ across) / itself
    return float(square.clamp(min=0).sqrt())


def test_any_width_between_is_reconstructed():
    assert relative_error(0.07) < 5e-3
    assert 8e-3 < relative_error(0.04) < 4e-2  # outside of the two it is worse
    for tracked in (0.05, 0.10):
        assert relative_error(tracked) < 1e-6


def test_one_snapshot_alone_is_no_reconstruction():
    alone = torch.zeros(len(TIMES), dtype=torch.float64)
    alone[-1] = 1  # the last of the wider average
    assert relative_error(0.07, alone) > 0.2


def test_averages_after_the_fact_are_those_tracked_meanwhile():
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(STEPS, dtype=torch.float64, generator=generator).cumsum(0) / STEPS**0.5
    network = Scalar()
    tracked = {std: PowerEma(network, std) for std in (0.05, 0.10, 0.07)}
    snapshots = {0.05: [], 0.10: []}
    for k, value in enumerate(walk.tolist(), 1):
        for ema in tracked.values():
            ema.update(network.at(value))
        if k % (STEPS // SNAPSHOTS) == 0:
            for std, kept in snapshots.items():
                kept.append({n: w.clone() for n, w in tracked[std].state_dict().items()})
    shares = snapshot_shares(TIMES, EXPONENTS, STEPS, power_exponent(0.07))
    combined = combine_snapshots(snapshots[0.05] + snapshots[0.10], shares)
    truth = tracked[0.07].state_dict()["weight"]
    error = (combined["weight"] - truth).abs().item()
    others = [(tracked[std].shadow["weight"] - truth).abs().item() for std in (0.05, 0.10)]
    assert error < 0.1 * min(others)
    assert combined["count"].item() == 3


def test_shares_sum_to_one_and_times_to_come_are_refused():
    shares = snapshot_shares(TIMES, EXPONENTS, STEPS * 0.9, power_exponent(0.08))
    assert shares.sum().item() == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="at 5000 cannot be made of snapshots up to 4096"):
        snapshot_shares(TIMES, EXPONENTS, 5000, 7.0)


def test_half_precision_weights_keep_their_dtype():
    snapshots = [{"w": torch.full((2,), v, dtype=torch.bfloat16)} for v in (1.0, 3.0)]
    combined = combine_snapshots(snapshots, torch.tensor([0.25, 0.75]))
    assert torch.equal(combined["w"], torch.full((2,), 2.5, dtype=torch.bfloat16))
