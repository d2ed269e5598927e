"""What the training stages share, without Ray."""

import pytest

from pipelines import ray_training
from pipelines.ray_training import Meter


def test_the_meter_tells_the_rate_lately_and_since_it_was_made(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(ray_training.time, "monotonic", lambda: now[0])
    meter = Meter()
    with meter.waiting():
        now[0] += 1
    meter.count(30)
    now[0] += 2
    assert meter.read() == pytest.approx({"samples_per_second": 10, "data_wait_share": 1 / 3})
    meter.count(10)
    now[0] += 5
    assert meter.read()["samples_per_second"] == pytest.approx(2)
    assert meter.mean() == pytest.approx({"mean_samples_per_second": 5})
