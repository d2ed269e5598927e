"""What becomes of a training's failures: tried again, told to the run, or the user's to mend."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ray.train import ControllerError, UserCallback

from ldm_core.errors import UserError
from pipelines.run_beside import RunBeside, told_beside
from pipelines.tracking import Run

CAUSE_LENGTH = 500  # of a tag's value
TOLD_S = 30.0  # that a mistake waits at most until the run is told of it

Summary = dict[str, Any]


def supervised(train: Callable[[], Summary], run: Run, retries: int) -> Summary:
    """Ray Train again when its controller has failed, which it does not retry for itself.

    Args:
        train: trains to the end, from the last checkpoint on.
        run: is told of failures.
        retries: that many.

    Raises:
        UserError: of a worker.
        TrainingFailedError: workers or the controller failed too often.
    """
    for attempt in range(retries + 1):
        try:
            return train()
        except Exception as error:
            cause = cause_of(error)
            if not isinstance(cause, ControllerError) or attempt == retries:
                raise cause from (error if cause is not error else None)
            print(f"Ray Train's controller failed, going on from the last checkpoint: {error}")
            _tag(run, f"controller_failure.{attempt + 1}", str(error)[-CAUSE_LENGTH:])
    raise AssertionError("unreachable")


def _tag(run: Run, name: str, value: str) -> None:
    try:
        run.tags({name: value})
    except Exception as error:  # of the tracking server: no reason to end a training
        print(f"could not tell the run of a failure, {value}: {error}", flush=True)


class Causes(UserCallback):
    """Tells the run why workers had to begin again, each reason once in a row.

    And raises what the user is to mend: Ray Train tries none of its callbacks' errors again.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.count, self.last = run, 0, ""
        self._beside: RunBeside | None = None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller, again and again while it waits.

        Raises:
            UserError: of a worker.
        """
        beside = self._tell(worker_exceptions)
        for error in worker_exceptions.values():
            if mistake := mistake_in(error):
                beside.outbox.flush(TOLD_S)  # the controller's process ends with this
                raise mistake

    def _tell(self, worker_exceptions: dict[int, Exception]) -> RunBeside:
        """From a thread: workers should not wait for the tracking server to begin again."""
        beside = self._beside = self._beside or told_beside(self.run, print)
        first = next(iter(worker_exceptions.values()), None)
        told = f"worker {', '.join(map(str, worker_exceptions))}: {first}"[-CAUSE_LENGTH:]
        if told != self.last:
            self.last = told
            self.count += 1
            now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
            beside.tags({f"failure.{now}.{self.count}": told})
        return beside


def cause_of(error: Exception) -> Exception:
    """The worker's own UserError if there is one, else the error as it came."""
    failures = (getattr(error, "worker_failures", None) or {}).values()
    of_callback = getattr(error, "controller_failure", None)
    found = (mistake_in(each) for each in (*failures, of_callback))
    return next(filter(None, found), error)


def mistake_in(error: Any) -> UserError | None:
    """The UserError behind an error, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = getattr(error, "cause", None) or error.__cause__
    return error
