"""Checkpoints of several workers: from layout to layout bit for bit, and killed while they save."""

import multiprocessing
import queue
import random
import time
from pathlib import Path

import pytest
import torch
from checkpoint_runs import (
    ARCHITECTURE,
    LAYOUTS,
    content,
    differing,
    from_layout_to_layout,
    go_on,
    kill,
    new_state,
    save_for_ever,
    whole,
)

from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints

KILLS = 12


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Where processes come from that have torch already: a fork of one that does nothing."""
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.set_forkserver_preload(["checkpoint_runs"])
        yield context


def test_from_layout_to_layout(processes, tmp_path):
    state, expected = new_state(), {}
    go_on(state, 0, 2)
    first = Checkpoints(str(tmp_path / "0"), ARCHITECTURE, LAYOUTS[0])
    first.save(2, state.tensors(), state.facts())
    first.wait()
    expected[0] = whole(state)
    for stage in range(1, len(LAYOUTS)):
        go_on(state, 1 + stage, 2 + stage)
        expected[stage] = whole(state)
    torch.save(expected, tmp_path / "expected.pt")
    barrier = processes.Barrier(4)
    workers = [
        processes.Process(target=from_layout_to_layout, args=(rank, str(tmp_path), barrier))
        for rank in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [0] * 4
    last = newest(str(tmp_path / str(len(LAYOUTS) - 1)))
    assert differing(read_tensors(last, ""), expected[len(LAYOUTS) - 1]) == []


def test_killed_at_random_moments_of_saving(processes, tmp_path):
    lots, root, committed = random.Random(0), str(tmp_path / "run"), 0
    steps = []
    for attempt in range(KILLS):
        told = processes.Queue()
        rendezvous = str(tmp_path / f"rendezvous-{attempt}")
        workers = [
            processes.Process(target=save_for_ever, args=(rank, 2, root, rendezvous, told))
            for rank in (0, 1)
        ]
        for worker in workers:
            worker.start()
        committed = max(committed, told.get(timeout=60))
        time.sleep(lots.uniform(0, 0.3))
        victim = attempt % 2
        kill(workers[victim])
        kill(workers[1 - victim])
        committed = max([committed, *drained(told)])
        found = newest(root, ARCHITECTURE, told=pytest.fail)
        assert found.step >= committed
        assert differing(read_tensors(found, ""), content(found.step)) == []
        assert found.state == {"step": found.step}
        steps.append(found.step)
    assert sorted(set(steps)) == steps  # each attempt went on from the one before


def drained(told) -> list[int]:
    values = []
    while True:
        try:
            values.append(told.get(timeout=0.05))
        except queue.Empty:
            return values
