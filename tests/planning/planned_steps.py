"""A planned step of a small network, to be varied."""

from dataclasses import replace

from planned_networks import DIT, build, inputs

from ldm_core.planning.forward_pass import measure_forward
from ldm_core.planning.step import Sample, Step
from ldm_core.planning.weights import weights_of
from ldm_core.training.layout import Layout


def step_of(config=DIT, size=(8, 8), **changes) -> Step:
    """One device, one micro-batch of four samples, AdamW, one average, float32."""
    network = build(config, "meta")
    forward = measure_forward(network, *inputs(size, "meta"))
    tokens = size[-1] * size[-2] // 4 * (size[0] if len(size) == 3 else 1)
    step = Step(
        weights=weights_of(network),
        samples=(Sample("64x64x1", tokens, 7, forward),),
        layout=Layout(),
        micro_batches=1,
        micro_samples={"64x64x1": 4},
        optimizer="adamw",
        averages=1,
        compute_bytes=4,
        checkpointing="none",
    )
    return replace(step, **changes)
