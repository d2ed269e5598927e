"""What Ray is asked for; no Ray is started."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ldm_core.errors import UserError
from pipelines import ray_runtime
from pipelines.ray_address import check_cluster
from pipelines.ray_runtime import TRAIN_ALONE, check_room
from pipelines.recipes import RECIPES
from pipelines.stage import Options, run_stage


@pytest.fixture(autouse=True)
def two_cpus(monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 1.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def dead() -> Iterator[str]:
    """An address that is taken, so that nobody else gets it, but does not answer."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


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


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer_is_refused_by_its_address(monkeypatch, dead, scheme):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray would try for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", scheme + dead)
    with pytest.raises(UserError, match=f"RAY_ADDRESS={scheme}{dead} .*unset RAY_ADDRESS"):
        ray_runtime.start()
    monkeypatch.setenv("RAY_ADDRESS", "head:port")
    with pytest.raises(UserError, match="RAY_ADDRESS=head:port"):
        ray_runtime.start()


def test_an_address_that_answers_or_is_rays_to_find_is_not_refused(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (
            f"127.0.0.1:{port}",
            f"ray://localhost:{port}",
            "auto",
            "local",
            "head",
            "",
        ):
            monkeypatch.setenv("RAY_ADDRESS", address)
            check_cluster()


def test_without_its_cluster_a_stage_opens_no_run(monkeypatch, dead, tmp_path: Path):
    monkeypatch.setenv("RAY_ADDRESS", dead)
    recipe = RECIPES["image-tiny"]().model_copy(update={"root": str(tmp_path / "run")})
    with pytest.raises(UserError, match=dead):
        run_stage(recipe, "train", recipe.product("teacher"), {}, {}, pytest.fail, Options())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_waits_until_ray_is_whole_and_a_second_one_does_not(monkeypatch):
    before, handler = signal.getsignal(signal.SIGINT), signal.default_int_handler
    signal.signal(signal.SIGINT, handler)  # a shell's background job begins with it ignored
    interrupts, whole = 1, []

    def init(*_: object, **__: object) -> None:
        for _ in range(interrupts):
            signal.raise_signal(signal.SIGINT)
        whole.append(True)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    try:
        for interrupts, whole in ((1, []), (2, [])):
            with pytest.raises(KeyboardInterrupt):
                ray_runtime.start()
            assert len(whole) == 2 - interrupts
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
