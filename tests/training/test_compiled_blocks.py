"""Compiled blocks compute what eager ones do, and are compiled once for all of them."""

import pytest
import torch
from parallel_runs import Case, sample_losses, video_dit
from torch._dynamo.testing import CompileCounterWithBackend

from ldm_core.training.layout import Layout
from ldm_core.training.parallel import parallelise
from ldm_core.training.recomputation import recompute_all, recompute_cheap

CASE, DEPTH = Case(Layout()), 3


@pytest.mark.parametrize(
    "recompute",
    [
        recompute_cheap,
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param(recompute_all, marks=pytest.mark.slow),
    ],
)
def test_blocks_share_their_code(recompute):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, network = video_dit(depth=DEPTH), video_dit(depth=DEPTH)
    device = torch.device("cpu")
    parallelise(
        network, network.blocks, Layout(), device,
        recompute=recompute, compile=True, backend=counter,
    )  # fmt: skip
    for model in (eager, network):
        sample_losses(model, CASE, 0, [0, 1, 2]).mean().backward()
    assert counter.frame_count == 1
    for ours, theirs in zip(network.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
