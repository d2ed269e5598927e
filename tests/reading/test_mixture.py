from fractions import Fraction

import numpy as np
import pytest

from ldm_core.errors import UserError
from ldm_core.reading.mixture import Mixture, Units


def units(*counts: int) -> dict[str, Units]:
    return {"b": Units(np.arange(len(counts), dtype=np.int32), np.array(counts, np.int32))}


def seen(mixture: Mixture, source: int, epoch: int) -> list[tuple[int, int, int]]:
    """(unit, row in the order of its pass, pass) of a store's samples in an epoch."""
    pieces = mixture.pieces("b", epoch)
    counts = np.diff(pieces.starts)
    return [
        (int(pieces.unit[k]), int(pieces.first[k]) + row, int(pieces.turn[k]))
        for k in np.flatnonzero(pieces.source == source)
        for row in range(int(counts[k]))
    ]


ALL = {(unit, row) for unit, count in enumerate((4, 7, 1, 5)) for row in range(count)}


class TestPasses:
    def test_weight_one_is_each_sample_once_an_epoch(self):
        mixture = Mixture([units(4, 7, 1, 5)], [1], seed=0)
        for epoch in range(5):
            found = seen(mixture, 0, epoch)
            assert len(found) == mixture.samples("b", epoch) == 17
            assert {(unit, row) for unit, row, _ in found} == ALL
            assert {turn for *_, turn in found} == {epoch}

    def test_weight_three_is_three_passes(self):
        found = seen(Mixture([units(4, 7, 1, 5)], [3], seed=0), 0, 2)
        for turn in (6, 7, 8):
            assert {(unit, row) for unit, row, t in found if t == turn} == ALL
        assert len(found) == 51

    @pytest.mark.parametrize("weight", [0.5, 0.3, 1.5, Fraction(2, 3), 0.01])
    def test_after_any_number_of_epochs_all_are_seen_alike(self, weight):
        mixture = Mixture([units(4, 7, 1, 5)], [weight], seed=0)
        counts = dict.fromkeys(ALL, 0)
        for epoch in range(12):
            if mixture.samples("b", epoch):
                for unit, row, _ in seen(mixture, 0, epoch):
                    counts[unit, row] += 1
            exact = (epoch + 1) * Fraction(weight).limit_denominator(10**6)
            assert sum(counts.values()) == int(exact * 17)
            assert set(counts.values()) <= {int(exact), int(exact) + 1}

    def test_shares_of_an_epoch_are_the_weights(self):
        mixture = Mixture([units(*[10] * 20), units(*[10] * 40)], [1, 0.25], seed=0)
        assert (mixture.samples("b", 0), mixture.samples("b", 3)) == (300, 300)
        assert (len(seen(mixture, 0, 1)), len(seen(mixture, 1, 1))) == (200, 100)

    def test_stores_are_mixed_all_through_an_epoch(self):
        pieces = Mixture([units(*[10] * 50), units(*[10] * 50)], [1, 1], seed=0).pieces("b", 0)
        assert 20 < np.abs(np.diff(pieces.source)).sum() < 80  # of 99 neighbours

    def test_a_bucket_that_one_store_lacks(self):
        other = {"c": units(3)["b"]}
        mixture = Mixture([units(4), other], [1, 2], seed=0)
        assert mixture.buckets == ("b", "c")
        assert (mixture.samples("b", 0), mixture.samples("c", 0)) == (4, 6)

    def test_seeds_and_epochs_differ(self):
        def order(seed: int, epoch: int) -> list[int]:
            return Mixture([units(*[2] * 30)], [1], seed).pieces("b", epoch).unit.tolist()

        assert order(0, 0) == order(0, 0)
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


@pytest.mark.parametrize("weights", [[], [1], [1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UserError, match="weights"):
        Mixture([units(4), units(4)], weights, seed=0)
