"""Adapters on many workers train as on one, and what is frozen keeps every bit."""

import pytest
import torch
from child_processes import PROCESSES
from lora_runs import CASES, be_one_of_two, train
from made_once import made_once
from parallel_runs import alone

from ldm_core.training.checkpoint_newest import newest
from ldm_core.training.checkpoint_tensors import read_tensors


@pytest.fixture(scope="module")
def outcomes(shared_folder):
    """Of the first worker, and the newest checkpoint, by case."""

    def make(folder):
        method = PROCESSES.get_start_method()
        torch.multiprocessing.start_processes(be_one_of_two, (str(folder),), 2, start_method=method)

    folder = made_once(shared_folder, "lora_parallel", make)
    outcomes = torch.load(folder / "0.pt")
    return {name: (outcomes[name], newest(str(folder / name))) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_any_layout_trains_adapters_as_one_process_does(outcomes, name):
    (ours, kept), theirs = outcomes[name], train(alone(CASES[name]))
    before = CASES[name].make()
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert all("lora_" in adapter for adapter in ours["average"])
    moved = 0
    for key, start in before.state_dict().items():
        if "lora_" not in key:
            assert torch.equal(ours["weights"][key], start), key
            continue
        for kind in ("weights", "average"):
            torch.testing.assert_close(ours[kind][key], theirs[kind][key], rtol=0, atol=5e-5)
        moved += not torch.equal(theirs["weights"][key], start)
    assert moved == len(ours["average"]) > 0
    assert set(kept.index) == {
        f"{of}/{key}" for of in ("model", "average/ema") for key in ours["average"]
    }
    for prefix, kind in (("model/", "weights"), ("average/ema/", "average")):
        for key, value in read_tensors(kept, prefix).items():
            assert torch.equal(value, ours[kind][key])
