import pytest

from ldm_core.training.guard import SpikeGuard
from ldm_core.training.schedules import (
    warmup_then_constant,
    warmup_then_cosine,
    warmup_then_decay,
)


class TestGuard:
    def test_an_outlier_is_refused_and_what_is_usual_is_not(self):
        guard = SpikeGuard(factor=5)
        usual = [1.0 + 0.1 * (k % 7) for k in range(40)]
        assert not any(guard.refuses(norm) for norm in usual)
        assert guard.refuses(7.0)
        assert not guard.refuses(4.0)

    def test_nothing_is_refused_before_it_has_seen_enough(self):
        guard = SpikeGuard(factor=2, least=4)
        assert [guard.refuses(10.0**k) for k in range(6)] == [False] * 4 + [True] * 2

    def test_a_gradient_that_grew_for_good_is_let_through(self):
        guard = SpikeGuard(factor=5)
        for _ in range(100):
            guard.refuses(1.0)
        refused = [guard.refuses(50.0) for _ in range(100)]
        assert 0 < sum(refused) < 20  # what ends a run
        assert refused == sorted(refused, reverse=True)

    def test_restored_it_decides_the_same(self):
        norms = [1.0, 1.2, 30.0, 1.1, 0.9, 8.0, 1.0, 1.3, 5.9, 6.0] * 4
        whole, first = SpikeGuard(4, window=8, least=4), SpikeGuard(4, window=8, least=4)
        expected = [whole.refuses(norm) for norm in norms]
        seen = [first.refuses(norm) for norm in norms[:13]]
        again = SpikeGuard(4, window=8, least=4)
        again.load_state_dict(first.state_dict())
        assert seen + [again.refuses(norm) for norm in norms[13:]] == expected
        assert any(expected)


STEPS, WARMUP = 100, 10
SCHEDULES = {
    "constant": lambda step: warmup_then_constant(step, WARMUP),
    "cosine": lambda step: warmup_then_cosine(step, STEPS, WARMUP),
    "decay": lambda step: warmup_then_decay(step, STEPS, WARMUP, 0.3),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_all_rise_alike_and_are_never_nothing(schedule):
    assert [schedule(step) for step in range(WARMUP)] == pytest.approx(
        [(step + 1) / WARMUP for step in range(WARMUP)]
    )
    after = [schedule(step) for step in range(WARMUP, STEPS)]
    assert all(0 < value <= 1 for value in after)
    assert after == sorted(after, reverse=True)


def test_half_a_cosine():
    assert warmup_then_cosine(10, STEPS, WARMUP) == 1.0
    assert warmup_then_cosine(55, STEPS, WARMUP) == pytest.approx(0.5)
    assert warmup_then_cosine(55, STEPS, WARMUP, least=0.1) == pytest.approx(0.55)
    assert warmup_then_cosine(99, STEPS, WARMUP) < 1e-3
    assert warmup_then_cosine(100, STEPS, WARMUP, least=0.1) == pytest.approx(0.1)
