import numpy as np
import pytest

from ldm_core.reading import lanes as lanes_module
from ldm_core.reading.lanes import Lanes, deal

BATCHES = np.array([37, 1, 0, 12])


def lanes_of(count: int, seed: int = 0, batches: np.ndarray = BATCHES) -> Lanes:
    return Lanes(count, seed, lambda epoch: batches + epoch % 2)  # epochs of two lengths


class TestDeal:
    @pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
    @pytest.mark.parametrize("first", [0, 5, 63])
    def test_stretches_are_end_to_end_and_lanes_alike(self, count, first):
        found = deal(BATCHES, count, first)
        assert (found.sizes.sum(0) == BATCHES).all()
        ends = found.starts + found.sizes
        assert (found.starts[0] == 0).all()
        assert (found.starts[1:] == ends[:-1]).all()
        assert np.ptp(found.sizes, axis=0).max() <= 1  # of every bucket
        batches = np.arange(first, first + BATCHES.sum())
        expected = np.bincount(batches % count, minlength=count)
        assert (found.sizes.sum(1) == expected).all()


class TestSlots:
    @pytest.mark.parametrize("count", [1, 2, 5, 64])
    def test_each_batch_of_each_epoch_is_taken_once_in_its_lanes_order(self, count):
        lanes, steps = lanes_of(count), -(-(50 + 54 + 50) // count)
        taken: dict[tuple[int, int, int], list[int]] = {}
        for step in range(steps):
            for lane in range(count):
                slot = lanes.slot(step, lane)
                taken.setdefault((slot.epoch, lane, slot.bucket), []).append(slot.place)
        for epoch in range(3):
            sizes = lanes.deal(epoch).sizes
            assert sizes.sum() == BATCHES.sum() + 4 * (epoch % 2)
            for lane in range(count):
                for bucket in range(4):
                    places = taken.get((epoch, lane, bucket), [])
                    assert places == list(range(sizes[lane, bucket]))

    def test_a_step_needs_no_history(self):
        lanes = lanes_of(3)
        told = {(s, k): lanes.slot(s, k) for s in range(60) for k in range(3)}
        for step, lane in [(59, 2), (17, 0), (0, 1), (40, 2)]:
            assert lanes_of(3).slot(step, lane) == told[step, lane]

    def test_seeds_epochs_and_lanes_mix_in_other_ways(self):
        def labels(seed: int, epoch: int, lane: int) -> list[int]:
            lanes = Lanes(2, seed, lambda _: np.array([100, 100]))
            return [lanes.slot(100 * epoch + k, lane).bucket for k in range(100)]

        told = [labels(0, 0, 0), labels(1, 0, 0), labels(0, 1, 0), labels(0, 0, 1)]
        for k, one in enumerate(told):
            assert sorted(one) == [0] * 50 + [1] * 50
            assert all(one != other for other in told[:k])

    def test_buckets_come_at_their_rate_all_through_an_epoch(self, monkeypatch):
        monkeypatch.setattr(lanes_module, "MIXED", 20)
        lanes = Lanes(2, 0, lambda _: np.array([1500, 490, 10]))
        labels = np.array([[lanes.slot(s, k).bucket for s in range(1000)] for k in range(2)])
        for lane in labels:
            assert np.bincount(lane).tolist() == [750, 245, 5]
            for start in range(0, 1000, 100):
                share = np.bincount(lane[start : start + 100], minlength=3)
                assert abs(share[0] - 75) <= 10
                assert share[2] <= 2
        rare = [np.flatnonzero(lane == 2).tolist() for lane in labels]
        assert rare[0] != rare[1]  # not all lanes at once
