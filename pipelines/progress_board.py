"""A training's progress, posted by its first worker and read by the driver.

In a module of its own, as Ray imports what an actor's class is defined beside: this one needs
neither torch nor MLflow.
"""

import ray


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where the first worker writes how far it is, and the driver reads it."""

    def __init__(self) -> None:
        self._state: tuple[int, str] = (0, "")

    def post(self, done: int, note: str) -> None:
        """Steps done so far and a short text."""
        self._state = (done, note)

    def read(self) -> tuple[int, str]:
        """What was posted last."""
        return self._state
