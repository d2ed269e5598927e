"""What a training worker decides for itself: its layout, and when to save out of turn."""

from types import SimpleNamespace

import pytest

from pipelines import denoiser_worker as module
from pipelines.denoiser_worker import ASK_S, SAVE_TICKS, Watch, layout_for


@pytest.mark.parametrize(
    ("shard", "context", "world", "expected"),
    [
        (1, 1, 3, (3, 1, 1)),
        (2, 1, 4, (2, 2, 1)),
        (2, 1, 3, (1, 3, 1)),  # one copy, in three shards
        (8, 1, 5, (1, 5, 1)),
        (1, 2, 4, (2, 1, 2)),
        (1, 2, 3, (3, 1, 1)),  # three workers do not share a sample's tokens between two
        (2, 2, 6, (1, 3, 2)),
    ],
)
def test_a_layout_for_as_many_workers_as_there_are(shard, context, world, expected):
    section = SimpleNamespace(layout=SimpleNamespace(shard=shard, context=context))
    layout = layout_for(section, world)
    assert (layout.replicate, layout.shard, layout.context) == expected
    assert layout.world == world


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


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
