"""One writer at a time, also when its owner dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import pytest
from faulty_proxy import FaultyProxy
from proxy_faults import by_lot, lost_answer, to

from ldm_core.errors import UserError
from ldm_core.latents import lock
from ldm_core.latents.lock import EXPIRY_S, LockHeld, Owner, locked, take, take_over
from ldm_core.patient_s3 import PatientS3


def numbers(uri: Path) -> list[int]:
    return sorted(int(path.stem) for path in (uri / "locks").iterdir())


def leave_behind(uri: Path, number: int, **told: object) -> None:
    """A lock as somebody else wrote it."""
    now = time.time()
    owner = {"host": "elsewhere", "pid": 7, "since": now - 600, "renewed": now} | told
    (uri / "locks").mkdir(parents=True, exist_ok=True)
    (uri / "locks" / f"{number:08d}.json").write_text(json.dumps(owner))


def test_the_second_is_refused_and_told_by_whom(tmp_path):
    with locked(str(tmp_path)) as first:
        with pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
            take(str(tmp_path))
        first.check()
    with locked(str(tmp_path)) as second:
        second.check()
    assert numbers(tmp_path) == [2]


def test_what_an_owner_elsewhere_does_not_renew_is_taken_over(tmp_path):
    leave_behind(tmp_path, 4)
    with pytest.raises(UserError, match=r"process 7 on elsewhere for 60\d s \(renewed 0 s ago\)"):
        take(str(tmp_path))
    leave_behind(tmp_path, 4, renewed=time.time() - EXPIRY_S - 1)
    with locked(str(tmp_path)):
        assert numbers(tmp_path) == [4, 5]
    assert numbers(tmp_path) == [5]


def test_who_waits_takes_over_from_an_owner_elsewhere_that_is_not_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOOK_S", 0.01)
    leave_behind(tmp_path, 4, renewed=time.time() - EXPIRY_S + 0.5)
    with locked(str(tmp_path), wait=True):
        assert numbers(tmp_path) == [4, 5]


def test_who_waits_is_refused_once_the_owner_gives_a_sign(tmp_path, monkeypatch):
    leave_behind(tmp_path, 4)
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            leave_behind(tmp_path, 4, renewed=time.time() + 1)

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(LockHeld, match="process 7 on elsewhere"):
        take_over(str(tmp_path))
    assert len(looks) == 3


def test_an_owner_here_is_known_to_live(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("there is nothing to wait for"))
    with locked(str(tmp_path)), pytest.raises(LockHeld):
        take_over(str(tmp_path))


def test_a_dead_owner_here_is_known_to_be_dead(tmp_path):
    script = (
        "import sys, os; from ldm_core.latents.lock import take; take(sys.argv[1]); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == 9
    [left] = numbers(tmp_path)
    assert not json.loads((tmp_path / "locks" / f"{left:08d}.json").read_text())["released"]
    with locked(str(tmp_path)):
        assert left + 1 in numbers(tmp_path)


def told(uri: Path, number: int) -> dict:
    return json.loads((uri / "locks" / f"{number:08d}.json").read_text())


def test_an_owner_in_another_namespace_of_this_host_is_waited_for(tmp_path):
    """Its process is not to be seen here, and renewed the lock a moment ago."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, check=True, text=True)  # fmt: skip
    mine = take(str(tmp_path))
    mine.release()
    boot, namespace = told(tmp_path, 1)["machine"].split()
    owner = {"host": socket.gethostname(), "pid": int(gone.stdout), "started": 1}
    for machine in (f"{boot} {int(namespace) + 1}", f"another {namespace}", ""):
        leave_behind(tmp_path, 2, machine=machine, **owner)
        with pytest.raises(UserError, match="is being written"):
            take(str(tmp_path))
    leave_behind(tmp_path, 2, machine=f"{boot} {namespace}", **owner)
    take(str(tmp_path)).release()


def test_an_owner_whose_process_is_hidden_is_waited_for(tmp_path, monkeypatch):
    """/proc may be mounted so that only one's own processes are there."""
    take(str(tmp_path)).release()
    before = told(tmp_path, 1) | {"released": False}
    leave_behind(tmp_path, 1, **before)

    def of_another_user(pid, signal):
        raise PermissionError(pid)

    monkeypatch.setattr(lock, "_started", lambda pid: None)
    monkeypatch.setattr(lock.os, "kill", of_another_user)
    with pytest.raises(UserError, match="is being written"):
        take(str(tmp_path))


def test_another_process_of_the_same_id_is_not_the_owner(tmp_path):
    """As in a container that is started again, whose first process is always 1."""
    take(str(tmp_path)).release()
    before = told(tmp_path, 1) | {"released": False}
    leave_behind(tmp_path, 1, **before)
    with pytest.raises(UserError, match="is being written"):
        take(str(tmp_path))
    leave_behind(tmp_path, 1, **before | {"started": before["started"] - 1})
    take(str(tmp_path)).release()


def test_who_was_thought_dead_finds_out(tmp_path):
    with locked(str(tmp_path)) as slow:
        leave_behind(tmp_path, slow.number + 1)
        with pytest.raises(UserError, match="another job took over"):
            slow.check()


def test_of_many_who_find_a_dead_owner_one_takes_over(tmp_path):
    leave_behind(tmp_path, 1, renewed=0.0)
    start, taken, refused = Barrier(16), [], []

    def race() -> None:
        start.wait()
        try:
            taken.append(take(str(tmp_path)))
        except UserError as error:
            refused.append(error)

    threads = [Thread(target=race) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 15)
    taken[0].release()


def test_a_lock_acknowledged_late_is_ours(tmp_path, monkeypatch):
    put = lock.put_if_absent

    def late(uri: str, data: bytes) -> None:
        put(uri, data)
        raise FileExistsError(uri)  # what the storage library's own retry then meets

    monkeypatch.setattr(lock, "put_if_absent", late)
    with locked(str(tmp_path)) as mine:
        mine.check()


def test_locks_in_a_bucket_that_loses_acknowledgements(s3, monkeypatch):
    """Of the taking as well as of the giving back."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        PatientS3.clear_instance_cache()
        proxy.rule(by_lot(0, 0.5, to("PUT", "/locks/")), lost_answer)
        for number in range(1, 6):
            with locked(f"{s3}/lossy") as mine:
                assert mine.number == number
                mine.check()
        assert proxy.counts["lost_answer"] > 3
    PatientS3.clear_instance_cache()


def test_one_that_was_taken_and_given_back_meanwhile_is_no_obstacle(tmp_path, monkeypatch):
    """Between our listing and our put another came, went, and a third cleaned up after it."""
    put, others = lock.put_if_absent, [1, 2]

    def beaten(uri: str, data: bytes) -> None:
        if others:
            number = others.pop(0)
            leave_behind(tmp_path, number + 1, released=True)
            raise FileExistsError(uri)  # whose file is no longer there
        put(uri, data)

    monkeypatch.setattr(lock, "put_if_absent", beaten)
    with locked(str(tmp_path)) as mine:
        assert mine.number == 4
    monkeypatch.setattr(lock, "put_if_absent", put)


def test_a_lock_that_never_stands_still_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_numbers", lambda uri: [7])  # listed, and gone when it is read
    with pytest.raises(UserError, match="changed hands 5 times"):
        take(str(tmp_path))


def test_the_owner_renews_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWAL_S", 0.01)
    with locked(str(tmp_path)) as mine:
        file = tmp_path / "locks" / f"{mine.number:08d}.json"
        deadline = time.monotonic() + 30
        while json.loads(file.read_text())["renewed"] == mine.owner.renewed:
            assert time.monotonic() < deadline, "never renewed"
            time.sleep(0.01)


def test_it_is_renewed_after_whatever_went_wrong(tmp_path, monkeypatch, caplog):
    write, failing = lock.write_bytes, [RuntimeError("no key"), OSError("away")]

    def fails_at_first(uri: str, data: bytes) -> None:
        if failing:
            raise failing.pop()
        write(uri, data)

    monkeypatch.setattr(lock, "RENEWAL_S", 0.01)
    monkeypatch.setattr(lock, "write_bytes", fails_at_first)
    with locked(str(tmp_path)) as mine:
        file = tmp_path / "locks" / f"{mine.number:08d}.json"
        deadline = time.monotonic() + 30
        while json.loads(file.read_text())["renewed"] == mine.owner.renewed:
            assert time.monotonic() < deadline, "never renewed"
            time.sleep(0.01)
    assert "is not renewed: no key; trying on" in caplog.text


def test_an_owner_is_alive_until_released_or_gone():
    mine = Owner(socket.gethostname(), os.getpid(), 0.0, 100.0)
    assert mine.alive(100.0 + EXPIRY_S)
    assert not mine.alive(101.0 + EXPIRY_S)
    assert not Owner(mine.host, mine.pid, 0.0, 100.0, released=True).alive(100.0)
