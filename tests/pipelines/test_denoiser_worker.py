"""What a training worker decides for itself: its layout, and when to save out of turn."""

import math
from itertools import product
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from pipelines import denoiser_worker as module
from pipelines.denoiser_worker import ASK_S, SAVE_TICKS, DenoiserTraining, Watch, layout_for
from pipelines.recipes.layout_section import LayoutSection
from pipelines.recipes.sections import TrainSection, Workers


def section(count: int, shard: int, context: int, least: int, parts: int) -> TrainSection:
    return TrainSection(
        workers=Workers(count=count), least_workers=least, micro_batches=parts,
        layout=LayoutSection(shard=shard, context=context), tokens=64,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("count", "shard", "context", "world", "expected"),
    [
        (4, 1, 1, 3, (3, 1, 1)),
        (4, 2, 1, 4, (2, 2, 1)),
        (4, 2, 1, 3, (1, 3, 1)),  # one copy, in three shards
        (8, 8, 1, 5, (1, 5, 1)),
        (4, 1, 2, 4, (2, 1, 2)),
        (4, 1, 2, 3, (3, 1, 1)),  # three workers do not share a sample's tokens between two
        (8, 2, 2, 6, (1, 3, 2)),
    ],
)
def test_a_layout_for_as_many_workers_as_there_are(count, shard, context, world, expected):
    layout = layout_for(section(count, shard, context, context, count), world)
    assert (layout.replicate, layout.shard, layout.context) == expected
    assert layout.world == world


def let_through(*numbers: int) -> TrainSection | None:
    try:
        return section(*numbers)
    except ValidationError:
        return None


def test_every_worker_has_a_micro_batch_however_many_there_are():
    """Exactly where that holds of all numbers of workers, the section is let through."""
    counted = {True: 0, False: 0}
    for count, shard, context, parts in product(range(1, 9), (1, 2), (1, 2, 3), range(1, 9)):
        if count % (shard * context) or parts < count // context:
            continue  # refused for other reasons
        for least in range(context, count + 1, context):
            made = let_through(count, shard, context, least, parts)
            worlds = range(least, count + 1)
            if made:
                layouts = [layout_for(made, world) for world in worlds]
                assert [layout.world for layout in layouts] == [*worlds]
                assert max(layout.data_world for layout in layouts) <= parts
            else:
                assert max(world // math.gcd(world, context) for world in worlds) > parts
            counted[made is not None] += 1
    assert min(counted.values()) > 20


def test_too_few_micro_batches_for_an_odd_number_of_workers_are_refused_with_a_remedy():
    with pytest.raises(ValidationError, match="up to 3 workers, .* set micro_batches 3 or more"):
        section(4, 1, 2, 2, 2)
    assert section(4, 1, 2, 2, 3)
    assert section(4, 1, 2, 4, 2)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("done", "warned", "expected"),
    [
        (1, True, ["snapshots", "save", "written", "losses"]),
        (1, False, ["snapshots", "save", "losses"]),
        (2, False, ["snapshots", "save", "losses"]),
    ],
)
def test_losses_are_waited_for_when_the_checkpoint_is_saved(done, warned, expected):
    said = []

    def says(word: str):
        return lambda *_: said.append(word)

    training = SimpleNamespace(
        section=SimpleNamespace(checkpoint_every=2), last=4,
        watch=SimpleNamespace(says_save=lambda: True, warned=warned),
        ending=SimpleNamespace(facts=lambda done: {}, keep=says("losses")),
        resuming=SimpleNamespace(save=says("save"), wait=says("written")),
        snapshots=SimpleNamespace(keep=says("snapshots")),
    )  # fmt: skip
    DenoiserTraining.keep(training, done)
    assert said == expected


@pytest.mark.parametrize(
    ("first", "judged"),
    [
        (0, []),
        (5, []),
        (6, [(6, False, True)]),
        (8, [(8, True, False)]),
        (10, [(10, True, True)]),  # the last
    ],
)
def test_training_that_goes_on_looks_at_its_checkpoint_again(first, judged):
    training, said = object.__new__(DenoiserTraining), []
    training.section = SimpleNamespace(validation_samples=1, validate_every=4, sample_every=6)
    training.last = 10
    training.resuming = SimpleNamespace(restore=lambda complete: first)
    training.snapshots = SimpleNamespace(begin=lambda first, last: None)
    training.ending = SimpleNamespace(
        has_lacking=None, go_on_from=lambda first: None, comes_at=lambda done: False
    )
    training.judge = lambda *asked: said.append(asked)
    assert training.begin() == first
    assert said == judged


@pytest.mark.parametrize(
    ("patience", "loss", "done", "room", "expected"),
    [
        (None, True, 4, True, ["takes", "gathered", False]),
        (None, True, 4, False, ["takes"]),
        (1, True, 4, False, ["gathered", True]),
        (1, False, 4, False, ["takes"]),  # pictures are not needed
        (None, True, 10, False, ["gathered", True]),  # the last
    ],
)
def test_weights_are_gathered_where_somebody_takes_them(
    monkeypatch, patience, loss, done, room, expected
):
    training, said = object.__new__(DenoiserTraining), []
    monkeypatch.setattr(module, "model_weights", lambda *_: (said.append("gathered"), {}))
    training.section = SimpleNamespace(patience=patience)
    training.last, training.first_worker = 10, True
    training.network = training.averages = None
    training.ending = SimpleNamespace(asked=lambda done: None)
    training.parallel = SimpleNamespace(most=lambda count: count)
    training.judged = SimpleNamespace(
        takes=lambda step: said.append("takes") or room,
        hand_over=lambda *asked: said.append(asked[-1]),
    )
    training.judge(done, loss, pictures=True)
    assert said == expected


def test_a_warning_is_saved_for_once(clock, monkeypatch):
    warned = [False]
    monkeypatch.setattr(module, "being_preempted", lambda: warned[0])
    watch, said = Watch(SimpleNamespace(most=lambda count: count)), []
    for going in (False, True, True, False, True):
        clock[0] += ASK_S + 1
        warned[0] = going
        said.append((watch.says_save(), watch.warned))
        assert not watch.says_save()  # not asked again so soon
    expected = [(False, False), (True, True), (False, True), (False, False), (True, True)]
    assert said == expected


def test_much_time_is_a_reason_too(clock, monkeypatch):
    monkeypatch.setattr(module, "being_preempted", lambda: False)
    watch, said = Watch(SimpleNamespace(most=lambda count: count)), []
    for _ in range(2 * SAVE_TICKS):
        clock[0] += ASK_S + 1
        said.append(watch.says_save())
    assert [k for k, each in enumerate(said, 1) if each] == [SAVE_TICKS, 2 * SAVE_TICKS]
