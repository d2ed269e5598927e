"""What Ray is asked for; no Ray is started."""

import pytest
import ray

from ldm_core.errors import UserError
from pipelines.ray_runtime import check_room


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 1.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_what_the_machine_does_not_have_is_refused():
    check_room("train", cpus=2, gpus=0, remedy="lower it")
    with pytest.raises(UserError, match="train needs 3 CPU of 2, 1 GPU of 0 .*: lower it, or set"):
        check_room("train", cpus=3, gpus=1, remedy="lower it")


def test_a_cluster_may_still_grow(monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check_room("encode", cpus=3, gpus=0, remedy="lower it")
    line = "[encode] waits for the cluster to grow: it needs 3 CPU of 2\n"
    assert capsys.readouterr().out == line
