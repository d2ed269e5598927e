"""What the meta device tells is what is counted and allocated where things are computed."""

import gc

import pytest
import torch
from covering import covering
from planned_networks import CASES, DIT, MMDIT, build, inputs
from planned_steps import planned
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ldm_core.planning.forward_pass import measure_forward
from ldm_core.planning.weights import blocks_of
from ldm_core.training.recomputation import recompute_all, recompute_cheap

EVERY = pytest.mark.parametrize(("config", "size"), CASES.values(), ids=CASES)


@EVERY
def test_flops_are_those_counted(config, size):
    network, given = build(config), inputs(size)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        network(*given).sum().backward()
    forward = planned(config, size).flops
    with FlopCounterMode(display=False) as alone, sdpa_kernel(SDPBackend.MATH):
        network(*given)
    assert forward == alone.get_total_flops()
    # A training step is three of them, less what the first layers need not pass on. Of a depthwise
    # convolution's backward pass torch counts as many FLOPs as if its channels were not apart.
    counts = counter.get_flop_counts()["Global"]
    apart = counts.get(torch.ops.aten.convolution_backward, 0)
    assert counter.get_total_flops() - apart == pytest.approx(3 * forward, rel=0.04)


def allocated(run):
    """Bytes that are allocated by `run` and still there when it returns."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        result = run()
    assert result is not None
    events = watch.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


MODES = {mode: mode for mode in ("none", "selective", "full")}


@pytest.mark.parametrize(("case", "mode"), covering(CASES, MODES))
def test_what_is_kept_is_what_is_allocated(case, mode):
    config, size = case
    network, given = build(config), inputs(size, batch=8)
    recompute = {"none": lambda block: None, "selective": recompute_cheap, "full": recompute_all}
    for _, block in blocks_of(network):
        recompute[mode](block)
    measured = allocated(lambda: network(*given))
    predicted = planned(config, size, batch=8).kept[mode]
    assert predicted == pytest.approx(measured, rel=0.10)


@EVERY
def test_checkpointing_keeps_less_and_repeats_more(config, size):
    forward = planned(config, size)
    assert forward.kept["none"] > forward.kept["selective"] > forward.kept["full"]
    assert forward.again["none"] < forward.again["selective"] < forward.again["full"]
    assert forward.widest < forward.again["full"]
    assert forward.block_flops < forward.flops


@pytest.mark.parametrize("config", [DIT, MMDIT], ids=["dit", "mmdit"])
def test_activations_grow_with_tokens_and_not_with_their_square(config):
    """Attention is fused: only tokens count, and so do samples."""
    few, more, most = (planned(config, (side, 32)).kept["none"] for side in (32, 64, 96))
    assert most - more == pytest.approx(more - few, rel=1e-3)
    two, four = (planned(config, (32, 32), batch=batch) for batch in (2, 4))
    assert four.of_one(4).kept["none"] == pytest.approx(two.of_one(2).kept["none"], rel=0.01)
    assert four.of_one(4).flops == pytest.approx(two.of_one(2).flops, rel=0.01)
    # alone, some tensors need no copy, and what samples share is its own
    assert two.of_one(2).kept["none"] == pytest.approx(few, rel=0.05)


@pytest.mark.parametrize("config", [DIT, MMDIT], ids=["dit", "mmdit"])
def test_half_precision_keeps_less_though_norms_are_in_full(config):
    full = planned(config, (16, 16))
    half = planned(config, (16, 16), autocast=torch.bfloat16)
    assert half.flops == full.flops
    assert 2 * half.attention_bytes == full.attention_bytes
    assert full.kept["none"] / 2 < half.kept["none"] < full.kept["none"]


def test_linear_layers_by_hand():
    """Two layers under autocast: each keeps its input cast, and ReLU its own result."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(8, 16, device="meta"),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 4, device="meta"),
    )
    x = torch.empty(5, 8, device="meta")
    plain = measure_forward(layers, x)
    assert plain.flops == 2 * 5 * (8 * 16 + 16 * 4)
    assert plain.kept["none"] == 4 * 5 * (8 + 16)  # the second layer's input is ReLU's result
    assert measure_forward(layers, x, autocast=torch.bfloat16).kept["none"] == 2 * 5 * (8 + 16)
