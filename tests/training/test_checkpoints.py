"""Saving and loading in one process: what is in, when it is copied, what stays, what is refused."""

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_runs import (
    ARCHITECTURE,
    differing,
    go_on,
    new_state,
    ranks_of_threads,
    whole,
)
from safetensors.torch import load_file

from ldm_core.errors import UserError
from ldm_core.training import (
    checkpoint_patience,
    checkpoint_retention,
    checkpoint_shards,
    checkpoints,
)
from ldm_core.training.checkpoint_folder import (
    INDEX,
    MANIFEST,
    STATE,
    Manifest,
    listing,
    read_checkpoint,
)
from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_ranks import Ranks
from ldm_core.training.checkpoint_retention import Retention, sweep
from ldm_core.training.checkpoint_state import TrainingState
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints, SaveFailed
from ldm_core.training.ema import Ema

ONES = {"model/weight": torch.ones(3, 5)}


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


def saved(root: str, *steps: int, retention: Retention = Retention(None)) -> Checkpoints:
    made = Checkpoints(root, ARCHITECTURE, retention=retention)
    for step in steps:
        made.save(step, {"model/weight": torch.full((3, 5), float(step))}, {"step": step})
    made.wait()
    return made


def steps_in(root: str) -> list[int]:
    return [int(name[5:14]) for name, files in listing(root).items() if MANIFEST in files]


def folder_of(root: str, step: int) -> Path:
    [folder] = Path(root).glob(f"step-{step:09d}.*")
    return folder


def no_warning(line: str) -> None:
    raise AssertionError(line)


def test_a_run_that_goes_on_is_the_run_that_did_not_stop(root):
    whole_run, first, second = new_state(), new_state(), new_state()
    go_on(whole_run, 0, 5)
    go_on(first, 0, 3)
    made = Checkpoints(root, ARCHITECTURE, "one")
    made.save(3, first.tensors(), first.facts() | {"guard": {"skipped": 1, "loss": 0.1}})
    made.wait()
    found = Checkpoints(root, ARCHITECTURE, told=no_warning).newest()
    assert found.step == 3
    assert found.state["guard"] == {"skipped": 1, "loss": 0.1}
    second.load(found)
    assert differing(whole(second), whole(first)) == []
    go_on(second, 3, 5)
    assert differing(whole(second), whole(whole_run)) == []
    assert second.averages["power"].updates == 5


def test_a_checkpoint_before_the_first_step_has_no_optimiser_state(root):
    first, second = new_state(), new_state()
    go_on(second, 0, 1)
    made = Checkpoints(root, ARCHITECTURE)
    made.save(0, first.tensors(), first.facts())
    made.wait()
    second.load(made.newest())
    assert differing(whole(second), whole(new_state())) == []


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8,
     torch.bool, torch.float8_e4m3fn],
)  # fmt: skip
def test_every_dtype_and_shape_comes_back(root, dtype):
    tensors = {
        f"model/{shape}": torch.randn(shape).mul(9).to(dtype)
        for shape in [(), (1,), (0, 3), (7,), (3, 5), (2, 3, 4), (2, 1, 3, 2)]
    } | {"model/turned": torch.randn(4, 6).to(dtype).T}
    made = Checkpoints(root, ARCHITECTURE)
    made.save(1, tensors, {})
    made.wait()
    read = read_tensors(made.newest(), "model/")
    assert [value.dtype for value in read.values()] == [dtype] * 8
    bits = {f"model/{name}": value.view(torch.uint8) if value.ndim else value
            for name, value in read.items()}  # fmt: skip
    expected = {name: value.contiguous().view(torch.uint8) if value.ndim else value
                for name, value in tensors.items()}  # fmt: skip
    assert differing(bits, expected) == []


def test_large_ones_are_cut_into_files_and_read_in_pieces(root, monkeypatch):
    monkeypatch.setattr(checkpoint_shards, "PART_BYTES", 2000)
    tensors = {f"model/{i}": torch.randn(3 + i, 50) for i in range(20)}
    made = Checkpoints(root, ARCHITECTURE)
    made.save(1, tensors, {})
    made.wait()
    found = made.newest()
    assert len(found.manifest.files) > 15
    sizes = [e.size for n, e in found.manifest.files.items() if n.startswith("part-00000-")]
    assert max(sizes) < 22 * 50 * 4 + 500
    assert differing(read_tensors(found, ""), tensors) == []


def test_nothing_in_it_is_pickled_and_the_manifest_tells_all(root):
    saved(root, 7)
    folder = folder_of(root, 7)
    assert sorted(path.name for path in folder.iterdir()) == [
        INDEX, MANIFEST, "part-00000-000.safetensors", STATE,
    ]  # fmt: skip
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    assert manifest.files.keys() == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert (manifest.step, manifest.workers, manifest.architecture) == (7, 1, ARCHITECTURE)
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    [part] = folder.glob("*.safetensors")
    assert load_file(part)["model/weight"].unique().tolist() == [7]


# When it is copied


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Nothing is written before it is open."""
    opened = threading.Event()
    write = checkpoints.write_bytes

    def wait(uri: str, data: bytes) -> None:
        assert opened.wait(20)
        write(uri, data)

    monkeypatch.setattr(checkpoints, "write_bytes", wait)
    return opened


def test_what_changes_after_the_call_does_not_leak_in(root, gate):
    state, facts = new_state(), {"counts": [1]}
    go_on(state, 0, 2)
    expected = whole(state)
    made = Checkpoints(root, ARCHITECTURE)
    made.save(2, state.tensors(), state.facts() | facts)
    go_on(state, 2, 5)  # in place, while nothing is written yet
    facts["counts"].append(2)
    gate.set()
    made.wait()
    found = made.newest()
    assert differing(read_tensors(found, ""), expected) == []
    assert found.state["counts"] == [1]
    assert found.state["averages"] == {"ema": 2, "power": 2}


def test_one_at_a_time(root, gate):
    made = Checkpoints(root, ARCHITECTURE)
    weight = torch.ones(3)
    made.save(1, {"model/weight": weight}, {})
    second = threading.Thread(target=made.save, args=(2, {"model/weight": weight + 1}, {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(20)
    made.wait()
    assert steps_in(root) == [2, 1]
    for step in (1, 2):
        found = read_checkpoint(str(folder_of(root, step)))
        assert read_tensors(found, "model/")["weight"].tolist() == [step] * 3


def test_the_memory_of_a_save_is_used_again_until_the_tensors_are_others(root):
    made = saved(root, 1)
    addresses = [t.data_ptr() for t in made._staging._host.values()]
    made.save(2, ONES, {})
    made.wait()
    assert [t.data_ptr() for t in made._staging._host.values()] == addresses
    made.save(3, {"model/weight": torch.zeros(2, 2), "model/other": torch.ones(1)}, {})
    made.wait()
    assert read_tensors(made.newest(), "model/")["weight"].tolist() == [[0, 0], [0, 0]]


# Failures


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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", [MANIFEST, INDEX, STATE, "part-00000-000.safetensors"])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_one_is_named_and_the_one_before_is_used(root, name, damage):
    saved(root, 1, 2)
    damage(folder_of(root, 2) / name)
    told: list[str] = []
    found = newest(root, ARCHITECTURE, told.append)
    assert found.step == 1
    assert read_tensors(found, "model/")["weight"].unique().tolist() == [1]
    if (name, damage) == (MANIFEST, Path.unlink):
        assert told == []  # it never was one
    else:
        [line] = told
        assert str(folder_of(root, 2)) in line
        assert name in line


def test_every_byte_of_a_manifest_counts(root):
    saved(root, 1, 2)
    path = folder_of(root, 2) / MANIFEST
    good = path.read_bytes()
    for place in range(0, len(good), 17):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        assert newest(root, ARCHITECTURE, lambda line: None).step == 1
    path.write_bytes(good)
    assert newest(root, ARCHITECTURE, no_warning).step == 2


def test_sizes_alone_are_quick_and_see_less(root):
    saved(root, 1, 2)
    [part] = folder_of(root, 2).glob("part-*")
    flip(part)
    assert newest(root, ARCHITECTURE, no_warning, hashes=False).step == 2
    cut(part)
    assert newest(root, ARCHITECTURE, lambda line: None, hashes=False).step == 1


def test_none_and_none_sound(root):
    assert newest(root) is None
    saved(root, 1, 2)
    for step in (1, 2):
        flip(folder_of(root, step) / STATE)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints at .* is sound"):
        newest(root, told=lambda line: None)


def test_of_two_of_the_same_step_the_later_one(root):
    saved(root, 1)
    made = Checkpoints(root, ARCHITECTURE, retention=Retention(None))
    made.save(1, ONES, {"again": True})
    made.wait()
    assert made.newest().state == {"again": True}


def test_another_architecture_is_refused(root):
    saved(root, 1)
    with pytest.raises(UserError) as told:
        newest(root, {"class": "Small", "width": 8})
    assert "(width 6 there, 8 here)" in str(told.value)
    assert read_checkpoint(str(folder_of(root, 1))).manifest.digest in str(told.value)


def test_another_format_is_refused(root, monkeypatch):
    saved(root, 1)
    path = folder_of(root, 1) / MANIFEST
    manifest = Manifest.model_validate_json(path.read_text())
    path.write_bytes(manifest.model_copy(update={"format": 2}).to_bytes())
    with pytest.raises(UserError, match="in format 2, this program reads 1"):
        newest(root)


def test_other_averages_or_optimisers_are_refused(root):
    state = new_state()
    go_on(state, 0, 1)
    made = Checkpoints(root, ARCHITECTURE)
    made.save(1, state.tensors(), state.facts())
    made.wait()
    found = made.newest()
    other = new_state()
    with pytest.raises(UserError, match=r"averages \['ema', 'power'\], this run keeps \['slow'\]"):
        TrainingState(other.network, other.optimizers, {"slow": Ema(other.network, 0.9)}).load(
            found
        )
    plain = (torch.optim.AdamW(other.network.parameters(), 0.1),)
    with pytest.raises(UserError, match=r"with Muon for first\.weight, this run has AdamW"):
        TrainingState(other.network, plain, other.averages).load(found)


# What stays


def test_the_last_and_every_nth_stay(root):
    saved(root, *range(1, 10), retention=Retention(last=2, every=4))
    assert steps_in(root) == [9, 8, 4]
    saved(root, 10, retention=Retention(last=2, every=4))
    assert steps_in(root) == [10, 9, 8, 4]


def test_snapshots_all_stay(root):
    saved(root, *range(1, 8), retention=Retention(last=None))
    assert steps_in(root) == list(range(7, 0, -1))


def test_attempts_without_a_manifest_go_with_the_next_save(root):
    saved(root, 1, 2)
    (folder_of(root, 2) / MANIFEST).unlink()
    (folder_of(root, 2) / ".part-left-by-a-kill").write_text("half")
    (Path(root) / "notes.txt").write_text("somebody's own")
    saved(root, 3)
    assert list(listing(root)) == [folder_of(root, 3).name, folder_of(root, 1).name]
    assert (Path(root) / "notes.txt").exists()


def test_damaged_ones_do_not_count(root):
    saved(root, 1, 2, 3)
    for step in (2, 3):
        cut(next(folder_of(root, step).glob("part-*")))
    saved(root, 4, retention=Retention(last=2))
    assert steps_in(root) == [4, 1]


def test_nothing_goes_unless_what_was_just_written_is_sound(root):
    saved(root, 1, 2)
    cut(next(folder_of(root, 2).glob("part-*")))
    assert sweep(root, Retention(1), folder_of(root, 2).name) == []
    assert steps_in(root) == [2, 1]


def test_a_removal_that_was_cut_short_leaves_no_half(root, monkeypatch):
    saved(root, 1, 2)
    order = []
    remove = checkpoint_retention.remove

    def first_only(uri: str) -> None:
        order.append(Path(uri).name)
        remove(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_retention, "remove", first_only)
    with pytest.raises(KeyboardInterrupt):
        sweep(root, Retention(1), folder_of(root, 2).name)
    assert order == [MANIFEST]
    assert newest(root, told=no_warning).step == 2
    assert steps_in(root) == [2]
