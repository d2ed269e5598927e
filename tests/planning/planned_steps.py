"""A planned step of a small network, to be varied; each network is measured once."""

from dataclasses import replace
from functools import cache

import torch
from planned_networks import DIT, build, inputs

from ldm_core.planning.forward_pass import ForwardPass, measure_forward
from ldm_core.planning.step import Sample, Step
from ldm_core.planning.weights import Weights, weights_of
from ldm_core.training.layout import Layout


@cache
def planned(config, size, batch: int = 1, autocast: torch.dtype | None = None) -> ForwardPass:
    """What the meta device tells of a forward pass."""
    return measure_forward(build(config, "meta"), *inputs(size, "meta", batch), autocast=autocast)


@cache
def counted(config) -> Weights:
    """What the meta device tells of the parameters."""
    return weights_of(build(config, "meta"))


def step_of(config=DIT, size=(8, 8), **changes) -> Step:
    """One device, one micro-batch of four samples, AdamW, one average, float32."""
    tokens = size[-1] * size[-2] // 4 * (size[0] if len(size) == 3 else 1)
    step = Step(
        weights=counted(config),
        samples=(Sample("64x64x1", tokens, 7, planned(config, size)),),
        layout=Layout(),
        micro_batches=1,
        micro_samples={"64x64x1": 4},
        optimizer="adamw",
        averages=1,
        compute_bytes=4,
        checkpointing="none",
    )
    return replace(step, **changes)
