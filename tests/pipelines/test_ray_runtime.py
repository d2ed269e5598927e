"""What Ray is asked for; no Ray is started."""

import os

import pytest
import ray

from ldm_core.errors import UserError
from pipelines import ray_runtime
from pipelines.ray_runtime import TRAIN_ALONE, check_room


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


@pytest.mark.parametrize("address", [None, "", "auto"])
def test_only_a_ray_of_its_own_goes_without_what_clusters_need(monkeypatch, address):
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda where=None, **_: asked.append(where))
    monkeypatch.setattr(ray_runtime, "quiet", lambda verbose: None)
    for name in TRAIN_ALONE:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    ray_runtime.start()
    local = not address
    assert asked == ["local" if local else None]
    assert {name: os.environ.get(name) for name in TRAIN_ALONE} == (
        TRAIN_ALONE if local else dict.fromkeys(TRAIN_ALONE)
    )


def test_the_users_own_settings_stay(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray_runtime, "quiet", lambda verbose: None)
    for name in TRAIN_ALONE:
        monkeypatch.setenv(name, "mine")
    ray_runtime.start()
    assert {os.environ[name] for name in TRAIN_ALONE} == {"mine"}
