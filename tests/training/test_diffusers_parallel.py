"""Transformers of diffusers train in two processes as in one: in copies and in shards."""

import pytest
import torch
from child_processes import PROCESSES
from diffusers_runs import CASES, COMPILED, WAN, be_one_of_two
from made_once import made_once
from parallel_runs import alone, train

# what is added to all keys alike changes no attention: AdamW makes steps of what rounding leaves
WITHOUT_GRADIENT = ("to_k.bias", "add_k_proj.bias")


@pytest.fixture(scope="module")
def outcomes(shared_folder):
    """By worker, by case."""

    def make(folder):
        WAN().model.save_pretrained(folder / "wan")
        method = PROCESSES.get_start_method()
        torch.multiprocessing.start_processes(be_one_of_two, (str(folder),), 2, start_method=method)

    folder = made_once(shared_folder, "diffusers_parallel", make)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_curve_is_that_of_one_process(outcomes, name):
    ours, theirs = outcomes[0][name], train(alone(CASES[name]))
    torch.testing.assert_close(ours["losses"], theirs.losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["norms"], theirs.norms, rtol=1e-4, atol=1e-5)
    assert ours["losses"] != ours["losses"][:1] * len(ours["losses"])
    assert ours["weights"].keys() == theirs.weights.keys()
    for key, weight in theirs.weights.items():
        if not key.endswith(WITHOUT_GRADIENT):
            torch.testing.assert_close(ours["weights"][key], weight, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do():
    ours, theirs = train(COMPILED), train(alone(COMPILED))
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=1e-5)


def test_shards_begin_with_the_folders_weights_and_the_models_own_tables(outcomes):
    network = WAN()
    expected = network.state_dict()
    expected |= {f"buffer {name}": buffer for name, buffer in network.named_buffers()}
    assert any(name.startswith("buffer rope") for name in expected)
    for worker in outcomes:
        found = worker["dealt out"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_so_do_shards_with_adapters(outcomes):
    first, second = (worker["dealt out with adapters"] for worker in outcomes)
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = {name.replace(".base_layer.", "."): weight for name, weight in first.items()}
    for name, weight in WAN().state_dict().items():
        assert torch.equal(plain[name], weight)
    factors = {name for name in first if ".lora_A." in name}
    assert len(factors) == 2 * 8  # queries, keys, values and results of two attentions in a block
    assert all(first[name].abs().max() > 0 for name in factors)
