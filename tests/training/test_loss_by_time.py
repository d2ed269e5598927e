import math

import pytest
import torch

from ldm_core import random
from ldm_core.conditioning.text import TextCondition
from ldm_core.training.loss_by_time import HeldOut, LossByTime, validation_loss


def rows(count: int, std: float = 1.0, first: int = 0) -> HeldOut:
    """Gaussian latents of standard deviation `std`."""
    ids = torch.arange(first, first + count)
    nothing = TextCondition(
        torch.zeros(count, 1, 1), torch.ones(count, 1, dtype=torch.bool), torch.zeros(count, 1)
    )
    return HeldOut(std * random.normal(9, "data", 0, ids, (4, 8, 8)), nothing, ids)


def best_velocity(std: float):
    """E[eps - x0 | x_t] of Gaussian data, by linear regression."""

    def velocity(x_t, t, cond):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / variance * x_t

    return velocity


def test_means_by_bin():
    found = LossByTime(4)
    found.add(torch.tensor([0.0, 0.2, 0.5, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0]))
    found.add(torch.tensor([0.1, 0.9]), torch.tensor([math.nan, 8.0]))
    assert found.read() == {"t0.125": 2.0, "t0.625": 5.0, "t0.875": 7.5}
    assert found.read() == {}


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_the_best_network_leaves_the_variance_that_nobody_can_predict(std):
    """Var(eps - x0 | x_t) = s^2 / ((1 - t)^2 s^2 + t^2)."""
    found = validation_loss(best_velocity(std), [rows(256, std)], seed=0, bins=4)
    for t in (0.125, 0.375, 0.625, 0.875):
        expected = std**2 / ((1 - t) ** 2 * std**2 + t**2)
        assert found[f"t{t:.3f}"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_good_network(value):
    def broken(x_t, t, cond):
        late = (t > 0.5).view(-1, 1, 1, 1) & (torch.arange(len(t)) == 1).view(-1, 1, 1, 1)
        return torch.where(late, value, torch.zeros_like(x_t))

    found = validation_loss(broken, [rows(4)], seed=0, bins=4)
    lost = {name for name, mean in found.items() if math.isnan(mean)}
    assert lost == {"t0.625", "t0.875", "mean"}
    of_all = validation_loss(lambda x_t, t, cond: value * torch.ones_like(x_t), [rows(2)], seed=0)
    assert len(of_all) == 9
    assert all(map(math.isnan, of_all.values()))
    assert math.isnan(validation_loss(broken, [], seed=0)["mean"])


def test_batches_and_their_order_change_nothing():
    whole = validation_loss(best_velocity(1.0), [rows(6)], seed=3)
    parts = validation_loss(best_velocity(1.0), [rows(2, first=4), rows(4)], seed=3)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert validation_loss(best_velocity(1.0), [rows(6)], seed=4) != whole
