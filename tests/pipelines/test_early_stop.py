"""Where training ends by itself: a function of the losses, whoever asks, however late they come."""

import json
import math
import random
import threading
from types import SimpleNamespace

import pytest

from ldm_core.errors import UserError
from pipelines.early_stop import LOSSES, EarlyStop, Standing, standing

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


def train(
    stop: EarlyStop, judged, first: int = 0, kill: int = 10**9, save: int = 3, last: int = LAST
):
    """Steps as the worker does them; returns the last one, and that of the last checkpoint."""
    saved = first
    stop.go_on_from(first)
    if first and stop.comes_at(first):
        return first, first
    if first and first % EVERY == 0:
        stop.asked(first)
        if judged:
            judged.hand_over(first)
    for done in range(first + 1, last + 1):
        if done == kill:
            return None, saved
        ends = stop.comes_at(done)
        if done % EVERY == 0 or done == last:
            stop.asked(done)
            if judged:
                judged.hand_over(done)
        if done % save == 0 or ends or done == last:
            stop.keep(done)
            saved = done
        if ends:
            return done, saved
    return None, saved


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
        end, _ = train(ending(tmp_path / str(number), judged, ALONE), judged)
        assert end == end_of(curve)
    assert {end_of(curve) for curve in curves(30)} > {None, 20, 30}  # not always the same


def test_all_workers_end_together(tmp_path):
    curve = next(each for each in curves(30) if end_of(each) == 25)
    together, judged, ends = Workers(3), Late(curve, 2), {}

    def work(rank: int) -> None:
        mine = judged if rank == 0 else None
        ends[rank] = train(ending(tmp_path, mine, together.of(rank)), mine)[0]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ends == {0: 25, 1: 25, 2: 25}


def test_a_killed_training_ends_where_it_would_have(tmp_path):
    """Losses that were on their way at the kill are asked for again, or known at the checkpoint."""
    draws = random.Random(1)
    for number, curve in enumerate(curves(40)):
        first = kills = 0
        end: int | None = None
        while kills < 4 and end is None:  # each time by another process, which knows nothing
            judged = Late(curve, draws.randrange(4))
            stop = ending(tmp_path / str(number), judged, ALONE)
            kill = first + draws.randrange(1, 25) if kills < 3 else 10**9
            end, first = train(stop, judged, first, kill, save=draws.choice([1, 4, 5, 7]))
            kills += 1
        assert end == end_of(curve), (curve, first)


def test_the_last_checkpoint_knows_all_losses_before_a_last_step_off_the_grid(tmp_path):
    """Whatever comes of its own loss, which has no say."""
    curve, last = [3.0, 2.0, 1.0], 2 * EVERY + 2
    for delay in (0, 3):
        judged, folder = Late(curve, delay), tmp_path / str(delay)
        assert train(ending(folder, judged, ALONE), judged, last=last) == (None, last)
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
    assert train(stop, judged) == (None, LAST)
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


def test_a_loss_that_cannot_be_had_ends_the_wait(tmp_path):
    judged = Late([1.0], 0)
    stop = ending(tmp_path, judged, ALONE)
    stop.asked(EVERY)
    judged.given_up[EVERY] = "no memory"
    with pytest.raises(RuntimeError, match=r"loss at step 5 decides .*patience 2.*no memory"):
        stop.comes_at(2 * EVERY)
