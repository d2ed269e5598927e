"""Saves that fail: whose fault they are, who hears of it, and what they leave."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_runs import (
    ARCHITECTURE,
    ranks_of_threads,
)
from saved_checkpoints import ONES, no_warning, saved, steps_in

from ldm_core.training import (
    checkpoint_patience,
    checkpoints,
)
from ldm_core.training.checkpoint_folder import (
    listing,
)
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_ranks import Ranks
from ldm_core.training.checkpoints import Checkpoints, SaveFailed


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


@pytest.fixture
def unwritable(root: str) -> Path:
    """A root on which no folder can be made: a file is in its place."""
    Path(root).write_text("")
    return Path(root)


def test_a_failed_save_is_raised_at_the_next_call(root, unwritable):
    made = Checkpoints(root, ARCHITECTURE)
    made.save(1, ONES, {})
    with pytest.raises(SaveFailed, match="checkpoint of step 1 could not be written"):
        made.save(2, ONES, {})
    unwritable.unlink()
    made.save(3, ONES, {})
    made.wait()
    assert steps_in(root) == [3]


def test_failed_saves_are_counted_and_told(root, unwritable):
    told = []
    made = Checkpoints(root, ARCHITECTURE, failed=told.append)
    for step in (1, 2):
        made.save(step, ONES, {})
    made.wait()
    unwritable.unlink()
    made.save(3, ONES, {})
    made.wait()
    unwritable.rename(f"{root}-away")
    unwritable.write_text("")
    made.save(4, ONES, {})
    made.wait()
    assert [(error.step, error.in_a_row) for error in told] == [(1, 1), (2, 2), (4, 1)]
    assert (made.failures, made.last.step) == (3, 3)


def test_storage_that_answers_again_in_time_is_no_failure(root, monkeypatch):
    monkeypatch.setattr(checkpoint_patience, "FIRST_PAUSE_S", 0.01)
    write, left = checkpoints.write_bytes, [4]

    def fails_at_first(uri: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] > 0:
            raise ConnectionError("away")
        write(uri, data)

    monkeypatch.setattr(checkpoints, "write_bytes", fails_at_first)
    saved(root, 1)
    assert newest(root, told=no_warning).step == 1
    left[0] = 1000
    with pytest.raises(SaveFailed, match="step 2 could not be written: away"):
        saved(root, 2)
    assert left[0] == 1000 - checkpoint_patience.ATTEMPTS
    assert steps_in(root) == [1]
    assert len(listing(root)) == 1  # what there was of the failed one is gone


def test_what_fails_for_one_worker_fails_for_all_and_can_be_told_apart(root, monkeypatch):
    write, broken = checkpoints.write_bytes, [True]

    def fails_for_the_second(uri: str, data: bytes) -> None:
        if broken[0] and "part-00001" in uri:
            raise PermissionError(f"may not write {uri}")
        write(uri, data)

    monkeypatch.setattr(checkpoints, "write_bytes", fails_for_the_second)
    tensors = {f"model/{i}": torch.ones(8) for i in range(6)}
    everybody = [Checkpoints(root, ARCHITECTURE, ranks=ranks) for ranks in ranks_of_threads(3)]

    def work(made: Checkpoints) -> str:
        made.save(1, tensors, {})
        try:
            made.wait()
        except SaveFailed as error:
            return str(error)
        return "saved"

    with ThreadPoolExecutor(3) as pool:
        [words] = set(pool.map(work, everybody))
        assert "part-00001" in words
        assert list(Path(root).iterdir()) == []
        broken[0] = False
        assert set(pool.map(work, everybody)) == {"saved"}
    assert newest(root).manifest.workers == 3


class OddError(Exception):
    """As a storage's client has them: neither an OSError nor to be pickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_a_failed_save_can_be_sent_to_another_process():
    failure = SaveFailed(7, OddError(1, 2))
    failure.in_a_row = 3
    failure.add_note("a note")
    there = pickle.loads(pickle.dumps(failure))
    assert isinstance(there, SaveFailed)
    assert str(there) == str(failure) == "the checkpoint of step 7 could not be written: 1 and 2"
    assert (there.step, there.in_a_row, there.__notes__) == (7, 3, ["a note"])


@pytest.mark.parametrize("when", ["writing", "clearing", "sweeping"])
def test_errors_of_any_class_are_failed_saves(root, monkeypatch, when):
    def fail(*_: object) -> None:
        raise OddError(1, 2)

    saved(root, 1)
    monkeypatch.setattr(checkpoints, "sweep" if when == "sweeping" else "write_bytes", fail)
    if when == "clearing":
        monkeypatch.setattr(checkpoints, "remove_checkpoint", fail)
    told, failures = [], []
    made = Checkpoints(root, ARCHITECTURE, told=told.append, failed=failures.append)
    made.save(2, ONES, {})
    made.wait()
    if when == "sweeping":
        assert (failures, made.last.step) == ([], 2)
        assert "could not be removed: 1 and 2" in told[0]
    else:
        assert [error.step for error in failures] == [2]
        assert hasattr(failures[0], "__notes__") == (when == "clearing")


def test_an_own_bug_is_no_failed_save(root, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(checkpoints, "write_bytes", fail)
    made = Checkpoints(root, ARCHITECTURE, failed=lambda failure: None)
    made.save(1, ONES, {})
    with pytest.raises(AssertionError, match="a bug"):
        made.wait()


def test_errors_that_cannot_travel_are_told_in_words():
    def fail() -> None:
        raise OddError(1, 2)

    for ranks in (Ranks(), ranks_of_threads(1)[0]):
        with pytest.raises(RuntimeError, match="OddError: 1 and 2"):
            ranks.first(fail)


# Which is the newest


def test_a_worker_lost_once_the_manifest_is_written_takes_nothing_away(root):
    """It is the exchange after that which fails; the next worker to begin finds the checkpoint."""

    def exchange(value):
        if isinstance(value, int):  # the checkpoint's bytes, the last that is said
            raise ConnectionError("connection closed by peer")
        return [value]

    made = Checkpoints(root, ARCHITECTURE, ranks=Ranks(0, 1, exchange))
    made.save(3, ONES, {})
    with pytest.raises(SaveFailed, match="closed by peer"):
        made.wait()
    found = newest(root, ARCHITECTURE, no_warning)
    assert found is not None
    assert found.step == 3


def test_a_storage_that_loses_the_end_of_files_is_told_of(root, monkeypatch):
    write, told = checkpoints.write_bytes, []
    monkeypatch.setattr(checkpoints, "write_bytes", lambda uri, data: write(uri, data[:-1]))
    made = Checkpoints(root, ARCHITECTURE, failed=told.append)
    for step in (1, 2):
        made.save(step, ONES, {})
    made.wait()
    assert [(error.step, error.in_a_row) for error in told] == [(1, 1), (2, 2)]
    assert "has not the files that were written to it" in str(told[0])
