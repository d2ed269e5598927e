"""The worker's side of validation: what is left out, what is tried again, when it gives up."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray.exceptions
import torch
from bucket_store import SQUARE, STATISTICS, bucket_store
from tiny_project import backbone

from ldm_core.latents.manifest import LatentStatistics
from ldm_core.reading.held_out import hold_out
from ldm_core.reading.index import index_store
from pipelines import validation
from pipelines.recipes.base import Workers
from pipelines.validation import (
    MOST_TRIES,
    MOST_WAITING,
    Judged,
    Pictures,
    Validator,
    held_out_digest,
)

PICTURES = Pictures(np.zeros((2, 2, 3), np.uint8), ["a caption"])
CRASH = ray.exceptions.RayActorError()


class Actor:
    """Takes calls, each by its number; what comes of them is said in the test."""

    def __init__(self, calls: list) -> None:
        def method(what: str) -> SimpleNamespace:
            return SimpleNamespace(
                remote=lambda _, step: calls.append((self, what, step)) or len(calls)
            )

        self.loss, self.show = method("loss"), method("show")


@pytest.fixture
def judged(monkeypatch):
    """A `Judged` whose actors' calls are in `.calls`; `.answers` are figures or errors, by call.

    `.full` are errors of the object store, one for each time that it is to take something.
    """
    answers: dict[int, object] = {}

    def wait(refs, num_returns, timeout):
        ready = [ref for ref in refs if ref in answers][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(ref):
        if isinstance(answers[ref], Exception):
            raise answers[ref]
        return answers[ref]

    calls: list = []
    full: list[Exception] = []

    def put(value):
        if full:
            raise full.pop()
        return value

    fake = SimpleNamespace(put=put, wait=wait, get=get, exceptions=ray.exceptions)
    monkeypatch.setattr(validation, "ray", fake)
    monkeypatch.setattr(Judged, "_begin", lambda _: Actor(calls))
    told: dict[str, object] = {}
    run = SimpleNamespace(
        metrics=lambda values, step: told.update(values),
        tags=told.update,
        document=lambda value, name: told.update({name: value}),
        image=lambda picture, key, step: told.update({f"{key} {step}": picture}),
    )
    made = Judged(SimpleNamespace(run=run, warn=lambda line, kind="": None), scene=None)
    made.calls, made.answers, made.told, made.full = calls, answers, told, full
    return made


def hand_over(judged, step: int, needed: bool = False) -> None:
    judged.hand_over({}, step, loss=True, pictures=True, needed=needed)


def figures(loss: float) -> dict[str, float]:
    return {"validation_loss": loss, "validation_loss/t0.5": loss}


def test_a_loss_is_known_and_told(judged):
    hand_over(judged, 7)
    assert [call[1:] for call in judged.calls] == [("loss", 7), ("show", 7)]
    judged.answers |= {1: figures(0.5)}
    judged.collect(0)
    assert judged.losses == {7: 0.5}
    assert judged.told == figures(0.5)


def test_pictures_are_told_by_whom_they_were_asked_for(judged):
    hand_over(judged, 7)
    judged.answers |= {2: PICTURES}
    judged.collect(0)
    assert judged.told == {"preview-captions.json": ["a caption"], "samples 7": PICTURES.sheet}
    assert judged.losses == {}


def test_what_is_not_needed_is_left_out_when_two_sets_wait(judged):
    for step in range(1, MOST_WAITING + 1):
        assert judged.takes(step)
        hand_over(judged, step)
    assert not judged.takes(MOST_WAITING + 1)
    assert [call[2] for call in judged.calls] == [1, 1, 2, 2]
    assert judged.told == {"skipped_validations": 1}
    hand_over(judged, 9, needed=True)
    assert [call[2] for call in judged.calls[4:]] == [9, 9]
    judged.answers |= {1: figures(0.5), 3: figures(0.4), 5: figures(0.3)}
    judged.answers |= dict.fromkeys((2, 4, 6), PICTURES)
    judged.wait()
    assert judged.losses == {1: 0.5, 2: 0.4, 9: 0.3}
    assert judged.takes(10)


def test_a_loss_that_is_needed_is_tried_again_and_pictures_are_not(judged):
    hand_over(judged, 7, needed=True)
    for call in (1, *range(3, MOST_TRIES + 2)):
        assert 7 not in judged.given_up
        judged.answers |= {2: CRASH, call: ray.exceptions.RaySystemError("no memory")}
        judged.collect(0)
    assert [call[1] for call in judged.calls] == ["loss", "show", "loss", "loss"]
    assert "no memory" in judged.given_up[7]
    assert len(judged.told) == judged.failed == MOST_TRIES + 1


def test_one_that_fails_once_is_known_in_the_end(judged):
    hand_over(judged, 7, needed=True)
    judged.answers |= {1: CRASH, 2: CRASH, 3: figures(0.25)}
    judged.wait()
    assert (judged.losses, judged.given_up) == ({7: 0.25}, {})


def test_the_loss_of_the_model_is_waited_for_and_pictures_are_not_for_long(judged, monkeypatch):
    monkeypatch.setattr(validation, "LAST_S", 0.0)
    said: list[str] = []

    def warn(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            judged.answers |= {1: figures(0.5)}

    judged.job.warn = warn
    hand_over(judged, 7, needed=True)
    judged.wait()
    assert judged.losses == {7: 0.5}
    assert "samples 7" not in judged.told
    assert said[0].startswith("waiting for the validation loss")
    assert said[-1].startswith("1 validations were not done")


def test_what_is_not_needed_is_not_tried_again(judged):
    hand_over(judged, 7)
    judged.answers |= {1: CRASH, 2: CRASH}
    judged.wait()
    assert len(judged.calls) == 2
    assert (judged.losses, judged.given_up) == ({}, {})


FULL = ray.exceptions.ObjectStoreFullError("no room")


def test_a_full_object_store_is_a_validation_that_failed(judged):
    judged.full += [FULL]
    hand_over(judged, 7)
    assert (judged.calls, judged.failed, judged.given_up) == ([], 1, {})
    assert "no room" in judged.told["validation_failure.1"]
    hand_over(judged, 8)
    assert [call[2] for call in judged.calls] == [8, 8]


def test_room_for_weights_that_are_needed_is_looked_for_again(judged):
    judged.full += [FULL] * (MOST_TRIES - 1)
    hand_over(judged, 7, needed=True)
    assert [call[2] for call in judged.calls] == [7, 7]
    judged.full += [FULL] * MOST_TRIES
    hand_over(judged, 8, needed=True)
    assert len(judged.calls) == 2
    assert list(judged.given_up) == [8]
    assert judged.failed == 2 * MOST_TRIES - 1


def test_an_actor_that_dies_over_two_sets_is_replaced_once(judged):
    first = judged._actor
    for step in (1, 2):
        judged.hand_over({}, step, loss=True, pictures=False, needed=True)
    judged.answers |= {1: CRASH, 2: CRASH}
    judged.collect(0)
    actors = [call[0] for call in judged.calls]
    assert actors[:2] == [first, first]
    assert actors[2] is actors[3] is judged._actor is not first


@pytest.fixture
def threads() -> Iterator[int]:
    """What torch has now, and has again afterwards."""
    count = torch.get_num_threads()
    yield count
    torch.set_num_threads(count)


def test_a_validator_on_a_cpu_has_a_worker_s_threads(threads):
    """The environment of Ray's processes says one."""
    workers = Workers(cpus=threads + 1.5)
    scene = SimpleNamespace(backbone=backbone())
    Validator(SimpleNamespace(workers=workers), scene, "meta")
    assert torch.get_num_threads() == threads
    Validator(SimpleNamespace(workers=workers), scene, "cpu")
    assert torch.get_num_threads() == threads + 1


def test_losses_compare_on_the_same_rows_noise_and_normalisation(tmp_path):
    index = index_store(bucket_store(tmp_path, {SQUARE: 40}))

    def digest(count=4, chosen=0, seed=0, statistics=STATISTICS) -> str:
        return held_out_digest(hold_out(index, count, chosen)[1], statistics, seed)

    other = LatentStatistics(mean=(0.0, 0.0), std=(1.0, 1.0))
    changed = [digest(count=5), digest(chosen=1), digest(seed=1), digest(statistics=other)]
    assert digest() == digest()
    assert len({digest(), *changed}) == 1 + len(changed)
    moved = replace(index, uri="elsewhere")
    assert held_out_digest(hold_out(moved, 4, 0)[1], STATISTICS, 0) == digest()
