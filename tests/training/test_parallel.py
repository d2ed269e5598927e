"""Any layout trains as one process does."""

from dataclasses import replace

import pytest
import torch
from child_processes import PROCESSES
from made_once import made_once
from muon_steps import SHAPES, normal, weights_of
from muon_steps import train as muon_train
from parallel_runs import BATCH, alone, train, video_dit
from parallel_workers import (
    AVERAGED,
    BAD,
    COMPILED,
    MUON_STEPS,
    ON_FOUR,
    ON_TWO,
    SNAPSHOT_SHARES,
    be_one_of,
    be_one_of_two_that_compile,
)

from ldm_core.backbones.context import Context
from ldm_core.errors import UserError
from ldm_core.training.optimizers import Muon

EXACT = [name for name in (*ON_TWO, *ON_FOUR) if "bf16" not in name]


def start(worker, folder, world):
    method = PROCESSES.get_start_method()
    torch.multiprocessing.start_processes(worker, (str(folder),), world, start_method=method)


@pytest.fixture(scope="module")
def outcomes(shared_folder):
    """By worker, by case."""
    folder = made_once(shared_folder, "parallel", lambda folder: start(be_one_of, folder, 4))
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.fixture(scope="module")
def references():
    """Trainings by one process, each done once."""
    done = {}

    def reference(case):
        case = alone(case)
        if case not in done:
            done[case] = train(case, with_averages=True)
        return done[case]

    return reference


@pytest.fixture(scope="module")
def held_by_one():
    """Bytes that one process holds of each kind: as many after one step as after all."""
    return train(replace(alone(ON_TWO["fsdp"]), steps=1), with_held=True).held


def apart(ours, theirs):
    """The largest difference between weights of the same name."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("name", EXACT)
def test_the_curve_is_that_of_one_process(outcomes, references, name):
    check_curve(outcomes[0][name], references((ON_TWO | ON_FOUR)[name]), name in AVERAGED)


@pytest.mark.slow
def test_compiled_curves_are_those_of_one_eager_process(tmp_path, references):
    start(be_one_of_two_that_compile, tmp_path, 2)
    outcomes = torch.load(tmp_path / "0.pt")
    for name, case in COMPILED.items():
        check_curve(outcomes[name], references(case), averaged=True)


def check_curve(ours, theirs, averaged):
    torch.testing.assert_close(ours["losses"], theirs.losses, rtol=0, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours["norms"], theirs.norms, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert ours["skipped"] == theirs.skipped
    assert theirs.norms[0] > 1.0  # clipping has something to do
    assert apart(ours["weights"], theirs.weights) < 5e-5
    averages = theirs.averages if averaged else {}
    assert ours["averages"].keys() == averages.keys()
    for average, weights in averages.items():
        assert apart(ours["averages"][average], weights) < 5e-5


@pytest.mark.parametrize("name", [*ON_TWO, *ON_FOUR])
def test_workers_report_the_same_and_the_first_alone_has_the_whole(outcomes, name):
    workers = outcomes if name in ON_FOUR else outcomes[:2]
    for kind in ("losses", "norms", "skipped"):
        seen = [torch.tensor(worker[name][kind]).tolist() for worker in workers]
        assert all(str(other) == str(seen[0]) for other in seen)  # NaN, too
    for worker in workers[1:]:
        assert not worker[name]["weights"]
        assert not any(worker[name]["averages"].values())


@pytest.mark.parametrize("name", ["ddp bad", "fsdp bad"])
def test_a_worker_with_a_nan_skips_the_step_of_all(outcomes, name):
    expected = [BAD in [(step * BATCH + i) % 64 for i in range(BATCH)] for step in range(10)]
    assert sum(expected) == 2
    for worker in outcomes[:2]:
        assert worker[name]["skipped"] == expected


def test_half_precision_is_near(outcomes, references):
    """Masters and gradients stay float32: the weights end where bf16 alone takes them."""
    ours, theirs = outcomes[0]["fsdp bf16"], references(ON_TWO["fsdp bf16"])
    assert ours["losses"] == pytest.approx(theirs.losses, rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in ours["weights"].values())


@pytest.mark.parametrize(("name", "parts"), [("fsdp", 2), ("hsdp", 2), ("fsdp four", 4)])
def test_shards_share_the_memory(outcomes, held_by_one, name, parts):
    workers = outcomes if name in ON_FOUR else outcomes[:2]
    for kind, total in held_by_one.items():
        held = [worker[name]["held"][kind] for worker in workers]
        assert sum(held) == total * len(workers) // parts
        assert max(held) < 1.1 * total / parts
    assert held_by_one["parameters"] == held_by_one["gradients"]
    assert held_by_one["averages"] == 2 * held_by_one["parameters"]


def test_copies_do_not(outcomes, held_by_one):
    assert outcomes[0]["ddp"]["held"] == held_by_one


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("name", "shapes"), [("muon", SHAPES), ("lone muon", SHAPES[:1])])
def test_muon_of_shards_is_that_of_whole_matrices(outcomes, name, shapes, world):
    """Among them six rows for four workers, the last of which holds none; and fewer matrices than
    workers."""
    whole = weights_of(shapes)
    muon_train(Muon(whole, 0.05, weight_decay=0.1), whole, MUON_STEPS)
    for worker in outcomes[:world]:
        for ours, theirs in zip(worker[f"{name} {world}"], whole, strict=True):
            torch.testing.assert_close(ours, theirs.data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_workers_that_share_muons_work_get_the_same_weights(outcomes, world):
    alone = weights_of()
    muon_train(Muon(alone, 0.05, weight_decay=0.1), alone, 3)
    for worker in outcomes[:world]:
        for ours, theirs in zip(worker[f"shared muon {world}"], alone, strict=True):
            torch.testing.assert_close(ours, theirs.data, rtol=0, atol=1e-5)  # other batches


@pytest.mark.parametrize("world", [2, 4])
def test_snapshots_of_shards_are_combined(outcomes, world):
    plain = sum(share * normal(5, 3, seed=i) for i, share in enumerate(SNAPSHOT_SHARES))
    for worker in outcomes[:world]:
        torch.testing.assert_close(worker[f"combined {world}"], plain)


def test_weights_that_one_worker_has_are_dealt_out(outcomes):
    ours, theirs = outcomes[1]["dealt out"], video_dit().state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_what_cannot_be_is_refused(outcomes):
    workers, heads, tokens, rows = outcomes[1]["refusals"]
    assert "is 3 workers, but there are 2" in workers
    assert "3 heads do not divide among 2 context workers" in heads
    assert "a Sequential cannot deal its tokens out" in tokens
    assert "smallest matrix of a block has 1 rows" in rows


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="6 tokens do not divide among 4 context workers"):
        Context(None, 0, 4).share(torch.zeros(2, 6), 1)
