"""Where training ends by itself: a function of the losses, whoever asks, however late they come."""

import json
import math
import random
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from ldm_core.errors import UserError
from pipelines import early_stop
from pipelines.early_stop import (
    ASK_S,
    FEWEST,
    LACKING,
    LOSSES,
    SAY_S,
    EarlyStop,
    Standing,
    standing,
)

NAN = math.nan
PATIENCE, EVERY, POINTS = 2, 5, 12
LAST = POINTS * EVERY


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], (math.inf, 0, 0)),
        ([3.0, 2.0, 1.0], (1.0, 3, 0)),
        ([1.0, 2.0, 1.0], (1.0, 1, 2)),  # as low is not lower
        ([2.0, NAN, 1.0, NAN], (1.0, 3, 1)),
        ([NAN, NAN], (math.inf, 0, 2)),
    ],
)
def test_standing(losses, expected):
    by_step = dict(enumerate(losses, 1))
    assert standing(by_step) == standing(dict(reversed(by_step.items()))) == Standing(*expected)


def end_of(curve: list[float], patience: int = PATIENCE) -> int | None:
    """The definition, word by word: index k of `curve` is the loss at step (k + 1) * EVERY."""
    for k in range(len(curve)):
        before = curve[:k]
        earlier, last = before[:-patience], before[-patience:]
        if earlier and all(not loss < min(earlier) for loss in last):
            return (k + 1) * EVERY
    return None


class Late:
    """Losses of a curve, each known only after so many questions."""

    def __init__(self, curve: list[float], delay: int) -> None:
        self.curve, self.delay = curve, delay
        self.losses: dict[int, float] = {}
        self.given_up: dict[int, str] = {}
        self.coming: dict[int, int] = {}

    def hand_over(self, step: int) -> None:
        self.coming[step] = self.delay

    def collect(self, seconds: float) -> None:
        for step in list(self.coming):
            self.coming[step] -= 1
            if self.coming[step] < 0:
                self.losses[step] = self.curve[step // EVERY - 1]
                del self.coming[step]


class Workers:
    """The largest of all workers' counts, between threads."""

    def __init__(self, count: int) -> None:
        self.barrier, self.counts = threading.Barrier(count, timeout=30), [0] * count

    def of(self, rank: int) -> SimpleNamespace:
        def most(count: int) -> int:
            self.counts[rank] = count
            self.barrier.wait()
            largest = max(self.counts)
            self.barrier.wait()
            return largest

        return SimpleNamespace(most=most)


def ending(folder, judged, parallel, patience: int | None = PATIENCE) -> EarlyStop:
    section = SimpleNamespace(patience=patience, validate_every=EVERY)
    return EarlyStop(section, parallel, judged, str(folder))


@dataclass
class Training:
    """Steps as the worker does them, and its checkpoints: of each the step, and its facts.

    Attributes:
        save: every so many steps.
        kill: at the beginning of this step, or between the next checkpoint and its losses.
        saving: whether it is the latter.
    """

    saved: list[tuple[int, dict]] = field(default_factory=list)
    save: int = 3
    kill: int = 10**9
    saving: bool = False
    last: int = LAST

    def restored(self, stop: EarlyStop) -> int:
        """The step gone on from; at most the newest checkpoint is of no use."""
        if self.saved and not stop.has_lacking(self.saved[-1][1]):
            self.saved.pop()
            assert not self.saved or stop.has_lacking(self.saved[-1][1])
        return self.saved[-1][0] if self.saved else 0

    def __call__(self, stop: EarlyStop, judged) -> int | None:
        """Returns the step it ended at, if it did."""
        first = self.restored(stop)
        stop.go_on_from(first)
        if first and stop.comes_at(first):
            return first
        if first and first % EVERY == 0:
            self.judge(stop, judged, first)
        for done in range(first + 1, self.last + 1):
            if done >= self.kill and not self.saving:
                return None
            ends = stop.comes_at(done)
            if done % EVERY == 0 or done == self.last:
                self.judge(stop, judged, done)
            if done % self.save == 0 or ends or done == self.last:
                self.saved = [*self.saved, (done, stop.facts(done))][-FEWEST:]
                if done >= self.kill:
                    return None
                stop.keep(done)
            if ends:
                return done
        return None

    def judge(self, stop: EarlyStop, judged, done: int) -> None:
        stop.asked(done)
        if judged:
            judged.hand_over(done)


ALONE = SimpleNamespace(most=lambda count: count)


def curves(count: int) -> list[list[float]]:
    """Some of them fall to the end."""
    draws = random.Random(0)
    slopes = [draws.choice([0.0, 0.5, 2.0]) for _ in range(count)]
    return [[draws.randint(1, 4) - slope * k for k in range(POINTS)] for slope in slopes]


@pytest.mark.parametrize("delay", [0, 3])
def test_it_ends_where_the_definition_says_however_late_losses_come(tmp_path, delay):
    for number, curve in enumerate(curves(30)):
        judged = Late(curve, delay)
        end = Training()(ending(tmp_path / str(number), judged, ALONE), judged)
        assert end == end_of(curve)
    assert {end_of(curve) for curve in curves(30)} > {None, 20, 30}  # not always the same


def test_all_workers_end_together(tmp_path):
    curve = next(each for each in curves(30) if end_of(each) == 25)
    together, judged, ends = Workers(3), Late(curve, 2), {}

    def work(rank: int) -> None:
        mine = judged if rank == 0 else None
        ends[rank] = Training()(ending(tmp_path, mine, together.of(rank)), mine)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == {0: 25, 1: 25, 2: 25}


def test_a_killed_training_ends_where_it_would_have(tmp_path):
    """Losses that were on their way at the kill are asked for again, or known at the checkpoint;
    or it goes on from the one before."""
    draws, passed_over = random.Random(1), 0
    for number, curve in enumerate(curves(60)):
        training, kills = Training(), 0
        end: int | None = None
        while kills < 4 and end is None:  # each time by another process, which knows nothing
            judged = Late(curve, draws.randrange(4))
            stop = ending(tmp_path / str(number), judged, ALONE)
            newest = training.saved[-1][0] if training.saved else 0
            training.kill = newest + draws.randrange(1, 25) if kills < 3 else 10**9
            training.save, training.saving = draws.choice([1, 4, 5, 7]), draws.random() < 0.5
            passed_over += training.restored(stop) < newest
            end = training(stop, judged)
            kills += 1
        assert end == end_of(curve), (curve, training.saved)
    assert passed_over > 10


def test_a_checkpoint_waits_for_no_loss_and_is_of_use_once_it_is_there(tmp_path):
    judged = Late([1.0, 2.0], delay=10**9)
    stop = ending(tmp_path, judged, ALONE)
    stop.asked(EVERY)
    judged.hand_over(EVERY)
    facts = stop.facts(EVERY + 2)
    assert judged.coming == {EVERY: 10**9}  # nobody has asked after it
    assert facts == {LACKING: [EVERY]}
    assert not stop.has_lacking(facts)
    judged.losses[EVERY] = 1.0
    stop.keep(EVERY + 2)
    assert ending(tmp_path, judged, ALONE).has_lacking(facts)
    assert stop.facts(EVERY + 3) == {LACKING: []}


def test_without_its_file_no_checkpoint_is_of_less_use(tmp_path):
    """The file has been lost, which is for the user to mend, and no reason to go back."""
    stop = ending(tmp_path, Late([], 0), ALONE)
    assert stop.has_lacking({LACKING: [15]})
    tmp_path.joinpath(LOSSES).write_text(json.dumps({"5": 1.0, "10": 2.0}))
    assert not stop.has_lacking({LACKING: [15]})


def test_the_last_checkpoint_knows_all_losses_before_a_last_step_off_the_grid(tmp_path):
    """Whatever comes of its own loss, which has no say."""
    curve, last = [3.0, 2.0, 1.0], 2 * EVERY + 2
    for delay in (0, 3):
        judged, folder = Late(curve, delay), tmp_path / str(delay)
        training = Training(last=last)
        assert training(ending(folder, judged, ALONE), judged) is None
        assert training.saved[-1][0] == last
        assert json.loads((folder / LOSSES).read_text()) == {"5": 3.0, "10": 2.0}
        again = Late(curve, delay)
        stop = ending(folder, again, ALONE)
        stop.go_on_from(last)
        assert stop.standing(last) == Standing(2.0, 10, 0)


def test_without_patience_nobody_waits_or_writes(tmp_path):
    def most(_: int) -> int:
        raise AssertionError("nobody is to be asked")

    judged = Late([1.0] * POINTS, 0)
    stop = ending(tmp_path, judged, SimpleNamespace(most=most), patience=None)
    training = Training()
    assert training(stop, judged) is None
    assert training.saved[-1] == (LAST, {})
    assert not judged.losses
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_lost_is_no_end_of_another_step(tmp_path):
    judged = Late([], 0)
    tmp_path.joinpath(LOSSES).write_text(json.dumps({"5": 1.0, "15": 2.0}))
    stop = ending(tmp_path, judged, ALONE)
    stop.go_on_from(9)
    assert judged.losses == {5: 1.0}
    with pytest.raises(UserError, match=r"validation-losses.json has no .* of step 10, .*--force"):
        stop.go_on_from(18)


def test_the_loss_of_a_step_has_no_say_in_whether_it_is_the_last(tmp_path):
    """It may be known when the reason is told, and when training goes on from that step."""
    judged = Late([], 0)
    judged.losses = {5: 1.0, 10: 1.0, 15: 1.0, 20: 0.5}  # as low is not lower
    stop = ending(tmp_path, judged, ALONE)
    assert [stop.comes_at(step) for step in (10, 15, 20)] == [False, False, True]
    assert stop.reason(20).startswith("2 validations since step 5 without a loss below 1 ")


def test_a_long_wait_is_told_of_every_few_minutes(tmp_path, monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(early_stop.time, "monotonic", lambda: now[0])

    class Slow(Late):
        """Whoever asks waits as long as it says."""

        job = SimpleNamespace(warn=lambda line, kind: told.append(line))

        def collect(self, seconds: float) -> None:
            now[0] += seconds
            super().collect(seconds)

    judged = Slow([1.0], delay=int(2.5 * SAY_S / ASK_S))
    stop = ending(tmp_path, judged, ALONE)
    stop.asked(EVERY)
    judged.hand_over(EVERY)
    assert not stop.comes_at(2 * EVERY)
    assert [line.partition(",")[0] for line in told] == [
        f"training has waited {minutes} minutes for the validation loss of step 5"
        for minutes in (3, 6)
    ]


def test_a_loss_that_cannot_be_had_ends_the_wait(tmp_path):
    judged = Late([1.0], 0)
    stop = ending(tmp_path, judged, ALONE)
    stop.asked(EVERY)
    judged.given_up[EVERY] = "no memory"
    with pytest.raises(RuntimeError, match=r"loss at step 5 decides .*patience 2.*no memory"):
        stop.comes_at(2 * EVERY)
