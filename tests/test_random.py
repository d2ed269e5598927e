import numpy as np
import pytest
import torch
from scipy import stats

from ldm_core.random import normal, permutation, random_bits, uniform

IDS = torch.arange(500) * 7919


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # kat_vectors of Random123
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = random_bits(tuple(key), tuple(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_sample_does_not_see_its_batch(draw):
    whole = draw(3, "noise", 11, IDS, (2, 3, 5))
    assert whole.shape == (500, 2, 3, 5)
    assert whole.dtype == torch.float32
    chosen = torch.tensor([400, 3, 77])
    assert torch.equal(draw(3, "noise", 11, IDS[chosen], (2, 3, 5)), whole[chosen])
    assert draw(3, "noise", 11, IDS[:4], ()).shape == (4,)
    assert draw(3, "noise", 11, IDS[:0], (2,)).shape == (0, 2)


@pytest.mark.parametrize(
    ("draw", "distribution", "mean", "variance"),
    [(uniform, stats.uniform, 0.5, 1 / 12), (normal, stats.norm, 0.0, 1.0)],
)
def test_distribution(draw, distribution, mean, variance):
    x = draw(0, "noise", 0, IDS, (401,)).double().numpy().ravel()
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / x.size)
    assert x.var() == pytest.approx(variance, abs=4 * variance * np.sqrt(2 / x.size))
    assert stats.kstest(x, distribution.cdf).pvalue > 0.01


def test_uniform_excludes_both_ends():
    x = uniform(0, "timestep", 0, IDS, (2000,))
    assert x.min() > 0
    assert x.max() < 1


@pytest.mark.parametrize(
    "other",
    [(1, "noise", 5, 0), (0, "posterior", 5, 0), (0, "noise", 6, 0), (0, "noise", 5, 1 << 33)],
    ids=["seed", "stream", "step", "id"],
)
def test_streams_are_uncorrelated(other):
    seed, stream, step, offset = other
    a = normal(0, "noise", 5, IDS, (64,)).ravel()
    b = normal(seed, stream, step, IDS + offset, (64,)).ravel()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / len(a) ** 0.5


def test_dimensions_of_a_sample_are_uncorrelated():
    x = normal(0, "noise", 0, torch.arange(4000), (9,))
    off_diagonal = torch.corrcoef(x.T) - torch.eye(9)
    assert off_diagonal.abs().max() < 4.5 / 4000**0.5


def test_permutation_is_one_and_changes_with_the_epoch():
    first = permutation(0, 0, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, permutation(0, 0, 1000))
    assert not np.array_equal(first, permutation(0, 1, 1000))
    assert not np.array_equal(first, permutation(1, 0, 1000))
