"""Real loops, real crashes and real lack of memory, in a real child process."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import guarded_functions
import numpy as np
import pytest
from guarded_functions import act
from PIL import Image

from ldm_core.errors import BadMedia, UserError
from ldm_core.media.decode import decode_image
from ldm_core.media.guarded import GuardedDecoder

MIB = 1 << 20
LONG = 60.0  # seconds that nothing here takes


def process_is_alive(pid: int) -> bool:
    """A zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition) -> bool:
    deadline = time.monotonic() + LONG
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def children() -> set[str]:
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for each in lists for pid in each.read_text().split()}


def reason_of(guard, *order) -> tuple[str, str]:
    with pytest.raises(BadMedia) as caught:
        guard.decode(*order)
    assert caught.value.stage == "decode"
    return caught.value.reason, caught.value.detail


@pytest.fixture(scope="module")
def guard():
    with GuardedDecoder(act, LONG, 512 * MIB) as guard:
        yield guard


@pytest.fixture
def hasty(guard):
    """The same child, with little time for each item."""
    guard.seconds = 0.2
    yield guard
    guard.seconds = LONG


def test_results_come_back(guard):
    pid = guard.decode("pid")
    assert pid != os.getpid()
    assert guard.decode("echo", b"bytes", (1, [None])) == (b"bytes", (1, [None]))
    pixels = guard.decode("zeros", 3, 1000, 2000)
    assert (pixels.shape, pixels.flags.writeable) == ((3, 1000, 2000), True)
    assert guard.decode("pid") == pid  # one child for all


@pytest.mark.parametrize("order", ["loop", "loop in C", "sleep"])
def test_what_never_ends_is_ended(hasty, order):
    assert reason_of(hasty, order) == ("timeout", "more than 0.2 s")
    hasty.seconds = LONG
    assert hasty.decode("echo", 1) == (1,)


@pytest.mark.parametrize(
    ("order", "how"), [("exit", "exit status 3"), ("abort", "SIGABRT"), ("kill", "SIGKILL")]
)
def test_a_crash_costs_one_item(guard, order, how):
    before = guard.decode("pid")
    assert reason_of(guard, order) == ("crashed", how)
    assert guard.decode("pid") != before


@pytest.mark.parametrize("order", ["hog", "deaf hog"])
def test_memory_is_bounded(guard, order):
    before = guard.decode("pid")
    assert guard.decode(order, 100 * MIB) == 1
    assert reason_of(guard, order, 600 * MIB)[0] == "out of memory"
    assert guard.decode("pid") != before  # what the last item left behind is gone with it
    assert guard.decode("limits") == (0, 0)  # no core files


def test_a_large_item_and_a_large_result_need_no_second_copy(guard):
    assert guard.decode("echo", bytes(300 * MIB))[0] == bytes(300 * MIB)


def test_a_child_that_died_between_two_items_is_no_items_fault(guard):
    pid = guard.decode("pid")
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not process_is_alive(pid))
    assert guard.decode("echo", 1) == (1,)


def test_errors_come_back_as_they_were(guard):
    assert reason_of(guard, "fail", "bad") == ("truncated", "at byte 7")
    with pytest.raises(UserError, match="install it"):
        guard.decode("fail", "user")
    with pytest.raises(KeyError):
        guard.decode("fail", "bug")
    with pytest.raises(RuntimeError, match="Stubborn: ab"):
        guard.decode("fail", "stubborn")
    with pytest.raises(Exception, match="lambda"):
        guard.decode("lambda")


def test_threads_take_turns(guard):
    with ThreadPoolExecutor(8) as threads:
        numbers = range(200)
        assert list(threads.map(lambda n: guard.decode("echo", n), numbers)) == [
            (n,) for n in numbers
        ]


def test_the_child_outlives_the_thread_that_asked_for_it():
    with GuardedDecoder(act, LONG, 512 * MIB) as guard:
        pids = []
        for _ in range(2):
            thread = threading.Thread(target=lambda: pids.append(guard.decode("pid")))
            thread.start()
            thread.join()
        assert pids == [guard.decode("pid")] * 2


def test_an_interrupted_item_leaves_no_answer_for_the_next(guard):
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        guard.decode("sleep")
    timer.join()
    assert guard.decode("echo", "next") == ("next",)


def test_nothing_is_left_behind():
    before = children()
    with GuardedDecoder(act, LONG, 512 * MIB) as guard:
        for order in ("exit", "kill", "exit"):
            reason_of(guard, order)
        pid = guard.decode("pid")
        assert len(children() - before) == 1  # the dead are buried
    assert children() <= before
    assert not process_is_alive(pid)
    with GuardedDecoder(act, LONG, 512 * MIB):
        assert children() <= before  # no item, no child


def test_a_function_that_cannot_be_imported_says_so(monkeypatch):
    monkeypatch.setattr(guarded_functions, "later", act, raising=False)
    monkeypatch.setattr(act, "__qualname__", "later")
    with (
        GuardedDecoder(act, LONG, 512 * MIB) as guard,
        pytest.raises(AttributeError, match="later"),
    ):
        guard.decode("pid")


PARENT = """
import sys
from guarded_functions import act
from ldm_core.media.guarded import GuardedDecoder

if __name__ == "__main__":
    guard = GuardedDecoder(act, 600, 512 << 20)
    print(guard.decode("pid"), flush=True)
    guard.decode({order!r})
"""


@pytest.mark.parametrize("order", ["loop in C", "sleep"])
def test_the_childs_life_ends_with_its_parents(order):
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT.format(order=order)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        child = int(parent.stdout.readline())
        assert process_is_alive(child)
        parent.kill()
    assert wait_until(lambda: not process_is_alive(child))


def png(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_that_are_larger_than_they_look():
    with GuardedDecoder(decode_image, LONG, 256 * MIB) as guard:
        bomb = png("1", (12_000, 12_000))
        assert len(bomb) < MIB
        assert reason_of(guard, bomb)[0] == "too large"
        wide = png("L", (50_000, 100))
        assert guard.decode(wide).shape == (100, 50_000, 3)
        within_the_pixels_but_not_the_memory = png("1", (50_000, 1_200))
        assert reason_of(guard, within_the_pixels_but_not_the_memory)[0] == "out of memory"
        assert reason_of(guard, b"no picture")[0] == "not an image"
        noise = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        assert np.array_equal(guard.decode(buffer.getvalue()), noise)
