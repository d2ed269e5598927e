"""The plan's bytes beside those that torch allocates."""

import gc
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from planned_networks import DIT, MMDIT, build, inputs
from planned_steps import step_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from ldm_core.planning.memory import memory_of, moments
from ldm_core.planning.weights import blocks_of
from ldm_core.training.layout import Layout
from ldm_core.training.optimizers import hidden_matrices, muon_and_adamw
from ldm_core.training.recomputation import recompute_all, recompute_cheap


@pytest.mark.parametrize("config", [DIT, MMDIT], ids=["dit", "mmdit"])
def test_moments_are_those_the_optimisers_make(config):
    network = build(config)
    network(*inputs((8, 8))).sum().backward()
    lists = [child for child in network.children() if isinstance(child, torch.nn.ModuleList)]
    both = muon_and_adamw(network, hidden_matrices(*lists), 1e-3)
    alone = torch.optim.AdamW(network.parameters())
    both.step(1.0)
    alone.step()
    step = step_of(config)
    for name, optimizers in (("muon", both.all), ("adamw", [alone])):
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        held = sum(
            value.numel() for state in states for value in state.values() if value.numel() > 1
        )
        assert moments(replace(step, optimizer=name)) == held


def test_by_hand():
    step = step_of(layout=Layout(replicate=2, shard=4), averages=3, compute_bytes=2)
    memory, total = memory_of(step), step.weights.total
    assert memory.weights == memory.gradients == total  # 4 bytes, a quarter each
    assert memory.optimizer == 2 * total
    assert memory.averages == 3 * total
    muon = memory_of(replace(step, optimizer="muon"))
    assert memory.optimizer - muon.optimizer == step.weights.hidden
    copies = memory_of(replace(step, layout=Layout(replicate=8)))
    assert copies.weights == 4 * total
    assert copies.working == 2 * total  # autocast's copy of every weight
    low, (rest, block) = 2, (step.weights.rest, step.weights.largest_block)
    assert memory.working == low * (rest + 2 * block) + (low + 4) * max(rest, block)


def test_shares_are_those_of_fsdp2():
    """On 1 of 8 workers that are not there: what fully_shard leaves it with."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        network = build(DIT)
        mesh = init_device_mesh("cpu", (8,))
        for _, block in blocks_of(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        held = sum(weight.to_local().nbytes for weight in network.parameters())
    finally:
        dist.destroy_process_group()
    assert memory_of(step_of(layout=Layout(shard=8))).weights == pytest.approx(held, rel=0.02)


def test_tokens_are_shared_and_captions_are_not():
    whole = step_of(size=(16, 16))
    shared = replace(whole, layout=Layout(context=4))
    ratio = memory_of(shared).activations / memory_of(whole).activations
    assert ratio == pytest.approx((7 + 64 / 4) / (7 + 64))
    assert memory_of(shared).weights == memory_of(whole).weights
    assert memory_of(replace(whole, layout=Layout(shard=2, context=4))).weights == pytest.approx(
        memory_of(whole).weights / 8
    )


def peak(run):
    """The most bytes that are allocated at once while `run` runs, beyond those before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        run()
    events = watch.profiler.kineto_results.events()
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("config", [DIT, MMDIT], ids=["dit", "mmdit"])
def test_the_peak_of_a_real_pass(config, mode):
    """What a forward and a backward pass add to weights and gradients that are there already."""
    network, given = build(config), inputs((32, 32), batch=4)
    recompute = {"none": lambda block: None, "selective": recompute_cheap, "full": recompute_all}
    for _, block in blocks_of(network):
        recompute[mode](block)

    def run() -> None:
        network(*given).square().sum().backward()

    run()  # gradients
    memory = memory_of(step_of(config, size=(32, 32), checkpointing=mode))
    assert memory.activations + memory.backward == pytest.approx(peak(run), rel=0.15)
