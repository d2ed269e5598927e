"""A step that has no room, and the one that is named instead."""

from dataclasses import replace

import pytest
from planned_steps import step_of

from ldm_core.planning.accelerators import USABLE, Accelerator
from ldm_core.planning.memory import memory_of
from ldm_core.planning.search import fits, fitting
from ldm_core.training.layout import Layout


def with_room(share: float, step) -> Accelerator:
    """A device on which so much of what the step needs is usable."""
    gib = share * memory_of(step).total / USABLE / 2**30
    return Accelerator("any", 100.0, gib, 1000, 100, 10, 8, 1.0)


def test_exactly_enough():
    step = step_of()
    assert fits(step, with_room(1 + 1e-9, step))
    assert not fits(step, with_room(1 - 1e-6, step))


@pytest.mark.parametrize("share", [0.7, 0.4, 0.25])
def test_what_is_named_fits_and_is_the_same_batch(share):
    step = step_of(micro_batches=8, layout=Layout(replicate=8), size=(16, 16))
    on = with_room(share, step)
    better = fitting(step, on, heads=4)
    assert better is not None
    assert fits(better, on)
    sample = step.samples[0]
    assert better.per_step(sample) == step.per_step(sample)
    assert better.micro_batches >= better.layout.data_world
    better.layout.check(better.layout.world, heads=4, rows=step.weights.fewest_rows)


def test_no_more_devices_than_needed():
    step = step_of(micro_batches=8, layout=Layout(replicate=8))
    assert fitting(step, with_room(0.7, step), heads=4).layout.world == 8
    alone = step_of(micro_batches=8)
    state = memory_of(alone).weights * 5
    tight = with_room(0.9 * state / memory_of(alone).total, alone)
    assert fitting(alone, tight, heads=4).layout.world == 2


def test_nothing_helps():
    step = step_of()
    assert fitting(step, with_room(1e-4, step), heads=4) is None


def test_every_bucket_has_to_fit():
    step = step_of()
    small = step.samples[0]
    large = replace(step_of(size=(32, 32)).samples[0], bucket="256x256x1")
    both = replace(step, samples=(small, large), micro_samples={"64x64x1": 4, "256x256x1": 4})
    assert memory_of(both).total > memory_of(step).total
    assert not fits(both, with_room(1.0001, step))
