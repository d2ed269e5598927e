"""`ldm schedule --kind local`: which times it takes, and how it ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import assert_mistake

from ldm_core.latents.store import LatentStore
from ldm_core.media.shapes import write_shapes
from pipelines import schedule_loop
from pipelines.cron import Cron
from pipelines.schedule_loop import run_child, run_loop, terminated_like_interrupted

PROJECT = Path(__file__).parents[2]
MIDNIGHT = datetime(2026, 1, 1, tzinfo=UTC)
END_S = 120  # seconds after which something hangs


class Clock:
    """A clock that passes only while somebody sleeps or works."""

    def __init__(self) -> None:
        self.time = MIDNIGHT
        self.started: list[datetime] = []

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.time += timedelta(seconds=seconds)

    def runs(self, work: Callable[[], int]) -> Callable[[], int]:
        """The work, with its beginning noted."""

        def run() -> int:
            self.started.append(self.time)
            return work()

        return run

    def minutes(self) -> list[float]:
        return [(time - MIDNIGHT) / timedelta(minutes=1) for time in self.started]


def test_a_time_that_comes_during_a_run_is_skipped(capsys):
    clock, seconds = Clock(), iter([150, 10, 60, 10])

    def work() -> int:
        clock.sleep(next(seconds))
        return 0

    times = Cron("* * * * *").times(MIDNIGHT)
    tally = run_loop(times, clock.now, clock.sleep, clock.runs(work), runs=4)
    assert clock.minutes() == [1, 4, 5, 6]  # a run that ends on the minute skips none
    assert (tally.runs, tally.failed) == (4, 0)
    output = capsys.readouterr().out
    assert "next run at 2026-01-01 00:01 UTC" in output
    assert output.count("skipped") == 1
    assert "2 skipped" in output


def test_a_failed_run_is_counted_and_the_next_one_tried(capsys):
    clock, codes = Clock(), iter([1, 0, 2])
    run = clock.runs(lambda: next(codes))
    tally = run_loop(Cron("0 * * * *").times(MIDNIGHT), clock.now, clock.sleep, run, runs=3)
    assert clock.minutes() == [60, 120, 180]
    assert str(tally) == "2 of 3 runs failed"
    assert "run 3 failed with exit code 2; 2 of 3 runs failed" in capsys.readouterr().out


def test_a_machine_that_slept_runs_once(capsys):
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds if clock.started else 3.5 * 3600)

    run_loop(Cron("0 * * * *").times(MIDNIGHT), clock.now, sleep, clock.runs(lambda: 0), runs=2)
    assert clock.minutes() == [210, 240]
    assert "2 skipped" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_runs_twice_and_publishes_once(tmp_path, monkeypatch, capfd):
    write_shapes(tmp_path / "data", 4, 32, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = ("--data", "data", "--root", "run", "--set", "autoencoder.source=identity")
    words += ("--set", "encode.workers.count=1")
    command = [sys.executable, "-m", "pipelines.cli", "encode", "image-tiny", *words]
    clock = Clock()
    times = (MIDNIGHT + timedelta(seconds=second) for second in (1, 2))
    tally = run_loop(times, clock.now, clock.sleep, clock.runs(lambda: run_child(command)))
    output = capfd.readouterr().out
    assert (tally.runs, tally.failed) == (2, 0), output
    assert LatentStore(str(tmp_path / "run" / "latents")).versions() == [1]
    assert output.count("version 1: 4 samples") == 1
    assert output.count("[encode] up to date") == 1


TELLS = """
import os, pathlib, signal, sys, time
{first}
try:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep({patience})
except KeyboardInterrupt:
    pathlib.Path("ended").write_text("cleanly")
"""


def test_a_run_is_interrupted_with_us(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    former = signal.getsignal(signal.SIGTERM)
    code = TELLS.format(first="", patience=END_S)
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        run_child([sys.executable, "-c", code])
    assert Path("ended").read_text() == "cleanly"
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_run_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(schedule_loop, "END_S", 0.1)
    first = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    first += "pathlib.Path('pid').write_text(str(os.getpid()))"
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        run_child([sys.executable, "-c", TELLS.format(first=first, patience=END_S)])
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert not Path("ended").exists()


def test_sigterm_ends_it_like_ctrl_c(tmp_path):
    words = ("schedule", "encode", "image-tiny", "--kind", "local", "--cron", "0 0 29 2 *")
    waiting = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert waiting.stdout is not None
    assert "next run at" in waiting.stdout.readline()
    waiting.send_signal(signal.SIGTERM)
    _, errors = waiting.communicate(timeout=END_S)
    assert waiting.returncode == 130
    assert len(errors.splitlines()) == 1, errors


def test_the_command_line_runs_it_so_many_times(ldm, monkeypatch):
    def soon(*_: object) -> Iterator[datetime]:
        while True:
            yield datetime.now(UTC) + timedelta(seconds=0.1)

    monkeypatch.setattr(Cron, "times", soon)
    words = ("image-tiny", "--kind", "local", *("--cron", "0 3 * * *"), "--data", "nowhere")
    result = ldm("schedule", "encode", *words, "--runs", 2)
    assert result.exit_code == 1
    assert result.stderr == "ldm: 2 of 2 runs failed\n"


def test_a_dry_run_names_the_next_times(ldm):
    words = ("image-tiny", "--kind", "local", "--cron", "0 3 * * *", "--time-zone", "Asia/Tokyo")
    lines = ldm("schedule", "encode", *words, "--dry-run").stdout.splitlines()
    assert lines[0] == "python -m pipelines.cli encode image-tiny"
    assert [line[-9:] for line in lines[1:]] == ["03:00 JST"] * 3
    assert_mistake(ldm("schedule", "encode", *words, "--runs", 0), "--runs")
