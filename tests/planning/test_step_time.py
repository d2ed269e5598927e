"""The model of a step's time: what it must give where it can be said in closed form."""

from dataclasses import replace

import pytest
from planned_steps import step_of

from ldm_core.errors import UserError
from ldm_core.planning.accelerators import ACCELERATORS, Accelerator, accelerator
from ldm_core.planning.step_time import UTILISATION, step_time
from ldm_core.planning.weights import muon_flops
from ldm_core.training.layout import Layout

FAST = Accelerator("fast", 1e-3, 80, 1e9, 1e9, 1e9, 8, 2.0)  # 1 GFLOP/s, links without end


def timed(step, on=FAST, **words):
    return step_time(step, step.samples[0], on, **words)


def test_computing_alone():
    step = step_of(compute_bytes=2)
    sample = step.samples[0]
    time = timed(step)
    assert time.compute == pytest.approx(4 * 3 * sample.forward.flops / (UTILISATION * 1e9))
    assert time.seconds == pytest.approx(time.compute, rel=1e-6)
    assert time.mfu == pytest.approx(UTILISATION, rel=1e-6)
    assert time.samples_per_second == pytest.approx(4 / time.seconds)
    assert time.cost_per_million(3600.0) == pytest.approx(1e6 * time.seconds / 4)
    full = timed(replace(step, compute_bytes=4))
    assert full.compute == pytest.approx(2 * time.compute)


def test_recomputation_takes_time_and_is_no_utilisation():
    step = step_of(compute_bytes=2)
    again = timed(replace(step, checkpointing="full"))
    blocks = step.samples[0].forward.block_flops / step.samples[0].forward.flops
    assert again.compute == pytest.approx((1 + blocks / 3) * timed(step).compute)
    assert again.mfu == pytest.approx(UTILISATION / (1 + blocks / 3), rel=1e-6)
    assert timed(replace(step, checkpointing="selective")).compute == timed(step).compute


def test_micro_batches_are_dealt_out():
    step = replace(step_of(compute_bytes=2), micro_batches=8)
    alone = timed(step)
    assert alone.samples == 32
    shared = timed(replace(step, layout=Layout(replicate=2, shard=2)))
    assert shared.compute == pytest.approx(alone.compute / 4)
    assert shared.samples == 32
    uneven = timed(replace(step, layout=Layout(replicate=3)))
    assert uneven.compute == pytest.approx(alone.compute * 3 / 8)


def test_what_communication_is_not_hidden():
    slow = replace(FAST, intra_gbs=1e-6, inter_gbs=1e-7)  # 1,000 and 100 bytes/s
    step = replace(step_of(compute_bytes=2), micro_batches=16)
    total, rate = step.weights.total, 0.8 * 1000
    assert timed(step, slow).exposed == 0  # alone
    replicas = replace(step, layout=Layout(replicate=2))
    hidden = 2 / 3 * timed(replicas, slow).compute / 8
    assert timed(replicas, slow).exposed == pytest.approx(2 * 4 * total / 2 / rate - hidden)
    shards = replace(step, layout=Layout(shard=2))
    moved = (2 * 2 + 4) * total / 2 / rate
    assert timed(shards, slow).exposed == pytest.approx(8 * moved - timed(shards, slow).compute)
    far = replace(step, layout=Layout(replicate=16))
    assert timed(far, slow).exposed > 10 * timed(replicas, slow).exposed  # between nodes


def test_tokens_dealt_out_are_exchanged_in_both_passes():
    slow = replace(FAST, intra_gbs=1e-6)
    step = step_of(compute_bytes=2, layout=Layout(context=2))
    time = timed(step, slow)
    grads = 2 * 4 * step.weights.total / 2 / 800 - 2 / 3 * time.compute
    exchanged = time.exposed - grads
    assert exchanged == pytest.approx(2 * 4 * step.samples[0].forward.attention_bytes / 4 / 800)


def test_the_optimiser():
    slow = replace(FAST, memory_gbs=1e-6)
    step = step_of(compute_bytes=2)
    numbers = (3 + 2 + 2 * 2) * step.weights.total
    assert timed(step, slow).update == pytest.approx(4 * numbers / 800)
    muon = timed(replace(step, optimizer="muon"))
    assert muon.update == pytest.approx(
        muon_flops(step.weights.matrices) / (UTILISATION * 1e9), rel=1e-3
    )


def test_accelerators():
    assert accelerator("H100-80").tflops == 989.4
    for each in ACCELERATORS.values():
        size = int(each.name.rpartition("-")[2])
        assert 0.9 * size < each.gib <= size
        assert each.intra_gbs >= each.inter_gbs
        assert each.bandwidth(each.per_node) == 1e9 * each.intra_gbs
        assert each.bandwidth(each.per_node + 1) == 1e9 * each.inter_gbs
    with pytest.raises(UserError, match="no accelerator H100: known are H100-80, H200-141"):
        accelerator("H100")
