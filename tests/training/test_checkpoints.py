"""Saving and loading in one process: what is in, when it is copied, and how it is written."""

import json
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_runs import (
    ARCHITECTURE,
    differing,
    go_on,
    new_state,
    whole,
)
from safetensors.torch import load_file
from saved_checkpoints import ONES, folder_of, no_warning, saved, steps_in

from ldm_core.training import (
    checkpoint_shards,
    checkpoints,
)
from ldm_core.training.checkpoint_folder import (
    INDEX,
    MANIFEST,
    STATE,
    Manifest,
    read_checkpoint,
)
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints")


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
