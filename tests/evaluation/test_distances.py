"""Distances of sets against closed forms and scipy."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from ldm_core.evaluation.distances import frechet_distance, square_root, squared_mmd

D = 5
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def covariance(rank=D):
    factor = randn(D, rank)
    return factor @ factor.T


def gaussian_kernel(x, y):
    return (-torch.cdist(x, y).square() / 2).exp()


def test_commuting_covariances_have_a_closed_form():
    axes = torch.linalg.qr(randn(D, D))[0]
    a, b = randn(2, D).abs()
    means = randn(2, D)
    found = frechet_distance(
        means[0], (axes * a.square()) @ axes.T, means[1], (axes * b.square()) @ axes.T
    )
    expected = (means[0] - means[1]).square().sum() + (a - b).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [D, 2])
def test_any_covariances_as_by_scipy(rank):
    a, b, means = covariance(), covariance(rank), randn(2, D)
    cross = np.trace(scipy.linalg.sqrtm((a @ b).numpy())).real
    expected = (means[0] - means[1]).square().sum() + a.trace() + b.trace() - 2 * cross
    torch.testing.assert_close(
        frechet_distance(means[0], a, means[1], b), expected, rtol=1e-6, atol=0
    )


def test_it_is_symmetric_and_zero_at_itself():
    a, b, means = covariance(), covariance(), randn(2, D)
    there, back = (
        frechet_distance(means[0], a, means[1], b),
        frechet_distance(means[1], b, means[0], a),
    )
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)
    assert frechet_distance(means[0], a, means[0], a).abs() < 1e-10
    torch.testing.assert_close(square_root(a) @ square_root(a), a)


def test_with_a_linear_kernel_the_spread_of_the_means_is_taken_off():
    """What makes it unbiased: |x - y|^2 of the means is too large by tr(S_x) / N + tr(S_y) / M."""
    x, y = randn(7, D), randn(4, D) + 1
    spread = x.T.cov().trace() / len(x) + y.T.cov().trace() / len(y)
    biased = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    found = squared_mmd(x, y, lambda a, b: a @ b.T)
    torch.testing.assert_close(found, biased - spread, rtol=1e-12, atol=1e-12)


def test_its_mean_over_all_ways_to_deal_a_set_in_two_is_zero():
    """Two halves of one set are of one distribution; the biased estimate is above 0 for each."""
    points = randn(6, 2)
    halves = [torch.tensor(s) for s in itertools.combinations(range(6), 3)]
    rest = [torch.tensor([i for i in range(6) if i not in s.tolist()]) for s in halves]
    found = [
        squared_mmd(points[a], points[b], gaussian_kernel)
        for a, b in zip(halves, rest, strict=True)
    ]
    assert torch.stack(found).mean().abs() < 1e-12


def test_mistakes_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="got 1 and 3"):
        squared_mmd(randn(1, D), randn(3, D), gaussian_kernel)
    with pytest.raises(ValueError, match="a mean of 5 numbers"):
        frechet_distance(randn(D), randn(D, D), randn(3), randn(3, 3))
