"""Checkpoints on a bucket that misbehaves and on a disk that is full."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_runs import ARCHITECTURE, content, differing, ranks_of_threads
from faulty_proxy import FaultyProxy
from proxy_faults import Request, broken_off, by_lot, fails, lost_answer, to

from ldm_core import patient_s3
from ldm_core.files import file_sizes
from ldm_core.patient_s3 import PatientS3
from ldm_core.training import checkpoint_patience
from ldm_core.training.checkpoint_folder import INDEX, MANIFEST, STATE, listing
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_retention import Retention
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints, SaveFailed

OWN_MOUNTS = ("unshare", "--mount", "--map-root-user")
VOLUME = 4 << 20


@pytest.fixture
def proxy(s3: str, monkeypatch) -> Iterator[FaultyProxy]:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own retries aside
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        PatientS3.clear_instance_cache()
        yield proxy
    PatientS3.clear_instance_cache()


@pytest.fixture
def hurried(monkeypatch) -> None:
    """Pauses between requests are short; how long one goes on is as it was."""
    monkeypatch.setattr(patient_s3.random, "uniform", lambda low, high: 0.05)


@pytest.fixture
def root(s3: str, request) -> str:
    return f"{s3}/checkpoints/{request.node.name}"


def save(made: Checkpoints, step: int) -> None:
    made.save(step, content(step), {"step": step})


def check(root: str, step: int) -> None:
    found = newest(root, ARCHITECTURE, told=pytest.fail)
    assert found.step == step
    assert found.state == {"step": step}
    assert differing(read_tensors(found, ""), content(step)) == []


def test_a_bucket_is_as_good_as_a_folder(root):
    made = Checkpoints(root, ARCHITECTURE, retention=Retention(2))
    for step in (1, 2, 3):
        save(made, step)
    made.wait()
    check(root, 3)
    assert [name[5:14] for name in listing(root)] == ["000000003", "000000002"]
    assert len(file_sizes(root)) == 2 * 4


@pytest.mark.parametrize(
    "seconds", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (12, 60))]
)
@pytest.mark.parametrize("part", ["/part-", MANIFEST])
def test_away_while_it_saves(root, proxy, part, seconds):
    made = Checkpoints(root, ARCHITECTURE)
    save(made, 1)
    made.wait()
    proxy.rule(to("PUT", part), proxy.gone(seconds), times=1)
    began = time.monotonic()
    save(made, 2)
    copied = time.monotonic() - began
    while proxy.counts["gone"] == 0:
        time.sleep(0.01)
    assert not made._flight.done()  # training goes on meanwhile: only the copy was waited for
    assert copied < seconds
    save(made, 3)
    made.wait()
    assert made.failures == 0
    check(root, 3)


def test_away_for_longer_than_a_request_waits(root, proxy, hurried, monkeypatch):
    monkeypatch.setattr(patient_s3, "PATIENCE_S", 0.2)
    monkeypatch.setattr(checkpoint_patience, "FIRST_PAUSE_S", 0.1)
    made = Checkpoints(root, ARCHITECTURE)
    proxy.rule(to("PUT", "/part-"), proxy.gone(1), times=1)
    save(made, 1)
    made.wait()
    check(root, 1)


def test_away_for_good_keeps_what_was_committed(root, proxy, hurried, monkeypatch):
    monkeypatch.setattr(patient_s3, "PATIENCE_S", 0.1)
    monkeypatch.setattr(checkpoint_patience, "ATTEMPTS", 2)
    monkeypatch.setattr(checkpoint_patience, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(PatientS3, "retries", 1)  # s3fs' own
    told: list[SaveFailed] = []
    made = Checkpoints(root, ARCHITECTURE, failed=told.append)
    save(made, 1)
    made.wait()
    proxy.rule(to("PUT", MANIFEST), fails(503))
    save(made, 2)
    made.wait()
    proxy.forgive()
    assert [error.step for error in told] == [2]
    check(root, 1)
    assert len(listing(root)) == 1
    save(made, 3)
    made.wait()
    check(root, 3)


def test_writes_that_are_done_and_not_acknowledged(root, proxy, hurried):
    made = Checkpoints(root, ARCHITECTURE, retention=Retention(1))
    for part in ("/part-", "index.json", "state.json", MANIFEST):
        proxy.rule(to("PUT", part), lost_answer, times=2)
    proxy.rule(to("POST"), lost_answer, times=1)  # the removal
    for step in (1, 2):
        save(made, step)
    made.wait()
    assert proxy.counts["lost_answer"] == 9
    check(root, 2)
    assert len(file_sizes(root)) == 4


def test_a_fifth_of_the_requests_fails(root, proxy, hurried):
    made = Checkpoints(root, ARCHITECTURE, retention=Retention(2))
    for seed, fault in enumerate((fails(500), fails(503), lost_answer, broken_off)):
        proxy.rule(by_lot(seed, 0.05, to("")), fault)
    for step in range(1, 6):
        save(made, step)
    made.wait()
    check(root, 5)
    assert made.failures == 0
    assert len(proxy.counts) > 3


def test_sixty_four_workers_ask_for_each_object_once(root, proxy):
    """Threads that act as workers; each writes its share of what all of them hold."""
    tensors = {f"model/{i}": torch.full((40, 100), float(i)) for i in range(200)}
    asked: Counter[tuple[str, str]] = Counter()

    def seen(request: Request) -> bool:
        asked[request.method, request.path.rpartition("/")[2]] += 1
        return False

    proxy.rule(seen, lost_answer)
    all_ranks = ranks_of_threads(64)
    everybody = [Checkpoints(root, ARCHITECTURE, ranks=ranks) for ranks in all_ranks]

    def work(made: Checkpoints) -> int:
        made.save(1, tensors, {})
        made.wait()
        return made.newest().step

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(work, everybody)) == [1] * 64
    parts = {path for method, path in asked if method == "PUT" and path.startswith("part-")}
    assert len(parts) == 64
    assert {asked["PUT", name] for name in (*parts, MANIFEST, INDEX, STATE)} == {1}
    assert {asked["GET", name] for name in parts} == {1}  # to verify it
    assert asked["GET", MANIFEST] == 2  # and once before old ones would be removed
    [listings] = [n for (method, path), n in asked.items() if method == "GET" and "latent" in path]
    assert listings <= 2 * 2
    sizes = [n for path, n in file_sizes(root).items() if "part-" in path]
    assert max(sizes) < 1.5 * min(sizes)
    found = newest(root)
    assert differing(read_tensors(found, ""), tensors) == []


def test_a_full_disk_costs_a_save_and_no_more(tmp_path):
    child = [*OWN_MOUNTS, sys.executable, __file__, str(tmp_path)]
    here = Path(__file__)
    paths = {"PYTHONPATH": f"{here.parent}:{here.parents[1]}"}
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount a tmpfs here, not even in a name space of their own")
    done = subprocess.run(
        child, env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failed"] == [2, 3]
    assert "No space left" in found["words"]
    assert found["newest"] == [1, 1, 1, 4]
    assert found["halves"] == []


# The child


def main(folder: Path) -> None:
    """Save on a volume that is full for the second and third time."""
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={VOLUME}", "tmpfs", str(folder)], check=True
    )
    root, ballast, told = str(folder / "run"), folder / "ballast", []
    made = Checkpoints(root, ARCHITECTURE, failed=told.append)
    found = []
    for step in (1, 2, 3, 4):
        if step == 2:  # the half of a checkpoint has room
            size = sum(t.nbytes for t in content(1).values())
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
            ballast.write_bytes(b"\0" * (free - size // 2))
        if step == 4:
            ballast.unlink()
        save(made, step)
        made.wait()
        found.append(newest(root, ARCHITECTURE, told=pytest.fail).step)
    answer = {
        "failed": [error.step for error in told],
        "words": str(told[0]),
        "newest": found,
        "halves": [str(path) for path in folder.rglob(".part-*")],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
