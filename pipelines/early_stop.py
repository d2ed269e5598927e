"""When training ends before its last step: after some validations in a row without a lower loss.

Where it ends is a function of the validation losses and their steps alone:

    it ends at the first validation step v at which, of the losses before v, the last `patience`
    are none of them lower than the lowest before those

Losses come from an actor beside training. So that no clock has a say, training waits at each
validation step for the loss of the one before, whose time is what validation may take for nothing.
The first worker decides and the others hear of it.

Losses are kept beside the checkpoints. A checkpoint waits for none of them, as its machine may be
about to go: it names those of the steps before it that are not kept yet, and training waits for
them once it is saved. Training that goes on from a checkpoint knows them all, or takes the one
before; the loss of a checkpoint's own step is found again from the weights it holds.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_core.errors import UserError
from ldm_core.files import exists, join, read_json, write_json
from ldm_core.training.checkpoint_patience import patiently
from ldm_core.training.parallel import Parallel
from pipelines.recipes.sections import TrainSection
from pipelines.validation import Judged

ASK_S = 10.0  # the longest that workers are without news of each other
SAY_S = 180.0  # between lines that say what is waited for
LOSSES = "validation-losses.json"  # in the folder of the run's checkpoints
LACKING = "losses_lacking"  # in a checkpoint's facts: steps
FEWEST = 2  # checkpoints that are kept: at most one of them lacks losses


@dataclass(frozen=True)
class Standing:
    """Of validation losses so far: the lowest, its step, and how many have come since."""

    lowest: float = math.inf
    step: int = 0
    since: int = 0


def standing(losses: Mapping[int, float]) -> Standing:
    """Of losses by step. One that is NaN is not lower than any."""
    lowest, at, since = math.inf, 0, 0
    for step in sorted(losses):
        since += 1
        if losses[step] < lowest:
            lowest, at, since = losses[step], step, 0
    return Standing(lowest, at, since)


class EarlyStop:
    """A worker's side of it; all workers make all calls. Without patience, all of them do nothing.

    Args:
        section: of the recipe.
        parallel: the network in its layout.
        judged: of the first worker, None on the others.
        folder: of the run's checkpoints.
    """

    def __init__(
        self, section: TrainSection, parallel: Parallel, judged: Judged | None, folder: str
    ) -> None:
        self.patience, self.every = section.patience, section.validate_every
        self.parallel, self.judged, self.uri = parallel, judged, join(folder, LOSSES)
        self._asked = 0  # the step whose loss is not known yet; 0 is none
        self._kept = 0  # losses that are written down

    def asked(self, step: int) -> None:
        """The loss after so many steps is asked for; waits for the one before it, which else nobody
        would wait for any more: the last step need not be a multiple of `validate_every`.
        """
        if self.patience is not None:
            self._settle(step)
            self._asked = step

    def go_on_from(self, first: int) -> None:
        """Take over the losses before the step that training goes on from.

        Raises:
            UserError: one is missing.
        """
        if self.patience is None or self.judged is None or not first:
            return
        known = {step: loss for step, loss in self._read().items() if step < first}
        missing = [step for step in range(self.every, first, self.every) if step not in known]
        if missing:
            raise UserError(
                f"{self.uri} has no validation loss of step {missing[0]}, which decides when a "
                f"training that goes on from step {first} ends (train.patience {self.patience}): "
                "put the file back, or begin again with --force"
            )
        self.judged.losses.update(known)
        self._kept = len(known)

    def comes_at(self, done: int) -> bool:
        """Whether training ends after `done` steps. Waits for the losses before it."""
        if self.patience is None or done % self.every:
            return False
        self._settle(done)
        over = self.judged is not None and self.standing(done).since >= self.patience
        return bool(self.parallel.most(int(over)))

    def facts(self, done: int) -> dict[str, Any]:
        """What a checkpoint after `done` steps says of losses; the first worker's counts."""
        if self.patience is None:
            return {}
        return {LACKING: [*range(self.every, done, self.every)][self._kept :]}

    def has_lacking(self, facts: Mapping[str, Any]) -> bool:
        """Whether the losses that a checkpoint lacked are kept by now; of the first worker alone.

        If not, whoever was to wait for them was killed, and the weights they are of are gone. But
        where those before them have gone too, the file has: `go_on_from` says so.
        """
        lacking = facts.get(LACKING, [])
        if not lacking:
            return True
        kept = self._read()
        before = range(self.every, lacking[0], self.every)
        return kept.keys() >= set(lacking) or not kept.keys() >= set(before)

    def keep(self, done: int) -> None:
        """After a checkpoint of `done` steps: wait for the losses before it, and keep them."""
        if self.patience is None:
            return
        self._settle(done)
        before = self._before(done)
        if self.judged is not None and len(before) > self._kept:
            patiently(lambda: write_json(self.uri, {str(step): x for step, x in before.items()}))
            self._kept = len(before)

    def standing(self, done: int) -> Standing:
        """Of the losses before `done` steps; of the first worker alone."""
        return standing(self._before(done))

    def reason(self, done: int) -> str:
        """Why training ended there; of the first worker alone."""
        now = self.standing(done)
        return (
            f"{now.since} validations since step {now.step} without a loss below {now.lowest:.6g} "
            f"(train.patience {self.patience})"
        )

    def _settle(self, done: int) -> None:
        """Wait for the loss that was asked for before; workers hear of each other meanwhile, as
        one that waits for long in silence is given up. So does the user, now and then."""
        said = began = time.monotonic()
        while 0 < self._asked < done:
            if self.parallel.most(int(self._heard())):
                self._asked = 0
            elif self.judged and time.monotonic() - said > SAY_S:
                said = time.monotonic()
                self._say(self.judged, said - began)

    def _say(self, judged: Judged, seconds: float) -> None:
        line = (
            f"training has waited {seconds / 60:.0f} minutes for the validation loss of step "
            f"{self._asked}, which decides when it ends (train.patience {self.patience})"
        )
        judged.job.warn(line, kind="a validation is waited for")

    def _heard(self) -> bool:
        if self.judged is None:
            return False
        if self._asked not in self.judged.losses:
            self.judged.collect(ASK_S)
        if cause := self.judged.given_up.get(self._asked):
            raise RuntimeError(
                f"the loss at step {self._asked} decides when training ends (train.patience "
                f"{self.patience}), and validation failed again and again: {cause}"
            )
        return self._asked in self.judged.losses

    def _read(self) -> dict[int, float]:
        kept = patiently(lambda: read_json(self.uri) if exists(self.uri) else {})
        return {int(step): loss for step, loss in kept.items()}

    def _before(self, done: int) -> dict[int, float]:
        losses = self.judged.losses if self.judged else {}
        return {step: losses[step] for step in sorted(losses) if step < done}
