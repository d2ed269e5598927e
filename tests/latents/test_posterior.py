import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from ldm_core.latents import posterior
from ldm_core.latents.posterior import posterior_noise

IDS = torch.arange(300) * 7919
EPOCHS = torch.arange(300) % 3


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (4, 2, 4, 4)])
def test_a_sample_does_not_see_its_batch(shape):
    whole = posterior_noise(3, EPOCHS, IDS, shape)
    assert whole.shape == (300, *shape)
    chosen = torch.tensor([250, 3, 77])
    assert torch.equal(posterior_noise(3, EPOCHS[chosen], IDS[chosen], shape), whole[chosen])
    assert posterior_noise(3, EPOCHS[:0], IDS[:0], shape).shape == (0, *shape)


def test_distribution():
    x = posterior_noise(0, EPOCHS, IDS, (401,)).double().numpy().ravel()
    assert abs(x.mean()) < 4 / np.sqrt(x.size)
    assert x.var() == pytest.approx(1, abs=4 * np.sqrt(2 / x.size))
    assert stats.kstest(x, "norm").pvalue > 0.01
    halves = posterior_noise(0, EPOCHS, IDS, (2, 200)).double().numpy()
    assert abs(np.corrcoef(halves[:, 0].ravel(), halves[:, 1].ravel())[0, 1]) < 4 / np.sqrt(60_000)


def test_seeds_epochs_and_samples_differ():
    def one(seed: int = 0, epoch: int = 5, id: int = 9) -> torch.Tensor:
        return posterior_noise(seed, torch.tensor([epoch]), torch.tensor([id]), (50,))

    told = [one(), one(seed=1), one(epoch=6), one(id=10), one(id=9 + (1 << 33))]
    for k, some in enumerate(told):
        assert all(not (some == other).any() for other in told[:k])
    assert torch.equal(one(), one())


def test_the_words_are_those_of_numpys_philox():
    [found] = posterior._levels(7, torch.tensor([2]), torch.tensor([11]), 11)
    digest = hashlib.blake2b(b"7\0posterior", digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"), counter=[0, 2, 11, 0])
    words = [int(word) for word in source.random_raw(3)]
    pieces = [word >> bits & 0xFFFF for word in words for bits in range(0, 64, 16)]
    assert found.tolist() == pieces[:11]


def test_the_levels_are_normal_to_float32():
    """Symmetric, of variance 1; their moments and quantiles are those of the distribution."""
    levels = posterior._QUANTILES.astype(np.float64)
    assert np.array_equal(levels, -levels[::-1])
    assert (np.diff(levels) > 0).all()
    assert levels.var() == pytest.approx(1, abs=1e-6)
    assert (levels**4).mean() == pytest.approx(3, rel=1e-3)
    middles = (np.arange(len(levels)) + 0.5) / len(levels)
    np.testing.assert_allclose(levels, stats.norm.ppf(middles), rtol=1e-4)
    assert 4.3 < levels.max() < 4.4
