"""Whether a step fits a device's memory, and the fastest that does instead."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import get_args

from ldm_core.planning.accelerators import Accelerator
from ldm_core.planning.forward_pass import Checkpointing
from ldm_core.planning.memory import memory_of
from ldm_core.planning.step import Step
from ldm_core.planning.step_time import step_time
from ldm_core.training.layout import Layout

MOST = 64  # times as many devices that a remedy may take


def fits(step: Step, on: Accelerator) -> bool:
    """Whether every bucket's step has room."""
    return memory_of(step).total <= on.usable_bytes


def fitting(step: Step, on: Accelerator, heads: int) -> Step | None:
    """The fastest step of the same samples that has room, on as few devices as possible.

    Changed are the layout, what is recomputed and how many micro-batches the samples are dealt out
    to; devices are added where nothing else helps.

    Args:
        step: that does not fit.
        on: each device.
        heads: of the network, which the context divides.

    Returns:
        None if none of up to `MOST` times the devices has room.
    """
    times = 1
    while times <= MOST:
        roomy = [each for each in _variants(step, times, heads) if fits(each, on)]
        if roomy:
            return max(roomy, key=lambda each: _rate(each, on))
        times *= 2
    return None


def _rate(step: Step, on: Accelerator) -> float:
    """Samples a second of the main bucket."""
    return step_time(step, step.samples[0], on).samples_per_second


def _variants(step: Step, times: int, heads: int) -> Iterator[Step]:
    world = step.layout.world * times
    modes: tuple[Checkpointing, ...] = get_args(Checkpointing)
    layouts = (
        Layout(world // (shard * context), shard, context)
        for shard, context in product(_divisors(world), _divisors(heads))
        if world % (shard * context) == 0 and shard * context <= step.weights.fewest_rows
    )
    for layout, mode, parts in product(layouts, modes, (1, 2, 4, 8, 16)):
        smaller = {name: count // parts for name, count in step.micro_samples.items()}
        exact = all(count % parts == 0 for count in step.micro_samples.values())
        micro_batches = step.micro_batches * parts
        if exact and micro_batches >= layout.data_world:
            yield replace(
                step,
                layout=layout,
                checkpointing=mode,
                micro_batches=micro_batches,
                micro_samples=smaller,
            )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
