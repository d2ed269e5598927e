"""`ldm submit` against a cluster of our own: a real `ray start --head`, dashboard and all."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from ldm_core.media.shapes import write_shapes
from pipelines import submit_job

PROJECT = Path(__file__).parents[2]
START_S, JOB_S = 240, 600  # seconds after which something hangs


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """A user's shell: with a token of its own, for Ray may ask for one."""
    # What an earlier Ray of this process left behind would point to that one.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(PROJECT),
        "MLFLOW_DISABLE_TELEMETRY": "true",  # a variable that goes with the job
    }


@pytest.fixture(scope="module")
def cluster(environment) -> Iterator[str]:
    """URL of the dashboard of a head node of two CPUs, in its own process group and folder."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: it names sockets
    port, dashboard, *others = free_ports(8)
    names = ("ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
             "runtime-env-agent-port", "metrics-export-port", "node-manager-port")  # fmt: skip
    ports = [f"--{name}={number}" for name, number in zip(names, others, strict=True)]
    with Path(folder, "head.log").open("wb") as log:
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
             "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
             f"--temp-dir={folder}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
             f"--dashboard-port={dashboard}", "--object-store-memory=100000000", *ports],
            env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(url, environment["RAY_AUTH_TOKEN"], head, Path(folder, "head.log"))
        yield url
    finally:
        stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(url: str, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(
        f"{url}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and head.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no dashboard at {url}: {log.read_text()}")


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head and its process group; asked politely it takes long."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


def ldm(environment: dict[str, str], folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_stage_runs_and_is_followed(cluster, environment, tmp_path):
    write_shapes(tmp_path / "data", 6, 32, 0)
    words = ("submit", "encode", "image-tiny", "--data", "data", "--root", "run")
    words += ("--set", "autoencoder.source=identity", "--set", "encode.workers.count=1")
    words += ("--address", cluster, "--working-dir", str(PROJECT))
    encode = ldm(environment, tmp_path, *words)
    mistake = ldm(environment, tmp_path, *words, "--data", "nowhere", "--root", "other")
    output, errors = encode.communicate(timeout=JOB_S)
    assert encode.returncode == 0, output + errors
    assert "[encode] version 1: 6 samples" in output  # the job's own
    assert LatentStore(str(tmp_path / "run" / "latents")).open_version().number == 1

    output, errors = mistake.communicate(timeout=JOB_S)
    assert mistake.returncode == 1
    assert "nowhere is empty or does not exist" in output
    assert errors.splitlines()[-1].endswith(
        "is FAILED: Job entrypoint command failed with exit code 2"
    )


class SlowToStart:
    """A cluster's client whose agent comes up after so many tries."""

    def __init__(self, tries: int) -> None:
        self.tries = tries

    def submit_job(self, **_: object) -> str:
        self.tries -= 1
        if self.tries >= 0:
            raise RuntimeError("status code 500: No available agent to submit job, please try …")
        return "raysubmit_1"


def test_a_cluster_that_is_still_starting_is_waited_for(monkeypatch):
    monkeypatch.setattr(submit_job, "POLL_S", 0)
    submission = submit_job.Submission("http://127.0.0.1:1", "ldm", {})
    assert submit_job._send(SlowToStart(3), submission) == "raysubmit_1"
    monkeypatch.setattr(submit_job, "AGENT_S", -1)
    with pytest.raises(UserError, match="http://127.0.0.1:1 has had no agent .* submit again"):
        submit_job._send(SlowToStart(3), submission)
