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
    found = posterior._uniform(7, torch.tensor([2]), torch.tensor([11]), 3)
    digest = hashlib.blake2b(b"7\0posterior", digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"), counter=[0, 2, 11, 0])
    words = source.random_raw(3).view("<i4").astype(np.float64)
    np.testing.assert_allclose(found[0].numpy(), words / 2**32 + 0.5, rtol=1e-6)


def test_no_word_makes_an_infinity(monkeypatch):
    class Extreme:
        state = {"state": {"counter": np.zeros(4)}, "buffer_pos": 4}

        def random_raw(self, count: int) -> np.ndarray:
            ends = np.array([-(2**31), 2**31 - 1], "<i4")
            return np.resize(ends, 2 * count).view(np.uint64)

    monkeypatch.setattr(np.random, "Philox", lambda key: Extreme())
    found = posterior_noise(0, EPOCHS[:2], IDS[:2], (64,))
    assert torch.isfinite(found).all()
    assert found.abs().max() < 7
