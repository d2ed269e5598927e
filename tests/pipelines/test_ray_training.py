"""What the training stages share, without Ray."""

import pytest

from pipelines import meter as module
from pipelines.meter import Meter
from pipelines.progress import Progress
from pipelines.ray_training import due


def test_what_is_due_every_so_often_is_due_at_the_end_too():
    assert [done for done in range(1, 8) if due(done, 3, 7)] == [3, 6, 7]


def test_going_on_is_said_once_for_each_step_it_goes_on_from(capsys):
    with Progress("teacher", 40, "steps") as bar:
        for first in (8, 8, 16, 16):
            bar.go_on_from(first)
    lines = [f"[teacher] goes on from {first} of 40 steps" for first in (8, 16)]
    assert capsys.readouterr().out.splitlines() == lines


def test_the_meter_tells_the_rate_lately_and_since_it_was_made(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    meter = Meter()

    def slow():
        for item in "ab":
            now[0] += 0.5
            yield item

    for _ in meter.waiting_for(slow()):
        meter.count(15)
        now[0] += 1
    assert meter.read() == pytest.approx({"samples_per_second": 10, "data_wait_share": 1 / 3})
    meter.count(10)
    now[0] += 5
    assert meter.read()["samples_per_second"] == pytest.approx(2)
    assert meter.mean() == pytest.approx({"mean_samples_per_second": 5})
