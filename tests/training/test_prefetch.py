import threading
import time

import pytest

from ldm_core.training.prefetch import Waited, prefetch


@pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (4, 1), (4, 3), (20, 2)])
def test_every_step_comes_once_and_in_order(ahead, threads):
    def read(step: int) -> int:
        time.sleep(0.002 * (step % 3))  # the later is often the sooner ready
        return step**2

    found = list(prefetch(read, 3, 15, ahead, threads))
    assert found == [(step, step**2) for step in range(3, 15)]


def test_so_many_are_read_ahead_and_no_more():
    begun = [threading.Event() for _ in range(9)]

    def read(step: int) -> int:
        begun[step].set()
        return step

    steps = prefetch(read, 0, 9, ahead=3)
    assert next(steps) == (0, 0)
    assert all(event.wait(10) for event in begun[:4])  # three beside the one we hold
    assert not begun[4].wait(0.05)
    steps.close()
    assert not any(event.is_set() for event in begun[4:])


def test_an_error_comes_at_its_step_though_later_ones_are_read():
    def read(step: int) -> int:
        if step == 2:
            raise OSError("step 2 cannot be read")
        return step

    steps = prefetch(read, 0, 9, ahead=4, threads=2)
    assert [next(steps), next(steps)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="step 2"):
        next(steps)


def test_leaving_early_leaves_no_thread():
    before = threading.active_count()
    for step, _ in prefetch(lambda step: step, 0, 1000, ahead=8, threads=4):
        if step == 3:
            break
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_waiting_is_measured():
    gate, waited = threading.Event(), Waited()

    def read(step: int) -> int:
        return step if gate.wait(10) else -1

    threading.Timer(0.1, gate.set).start()
    assert list(prefetch(read, 0, 2, waited=waited)) == [(0, 0), (1, 1)]
    assert waited.seconds > 0.05
