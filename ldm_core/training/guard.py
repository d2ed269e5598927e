"""A guard against steps whose gradient is far larger than those before: bad data, bad luck."""

from collections import deque
from statistics import median
from typing import Any


class SpikeGuard:
    """Says whether a gradient norm is more than `factor` times the median of the last ones.

    Norms that are refused count as well, so that a gradient that grew for good is let through when
    it makes up half of the window: 16 steps, less than what ends a run as hopeless.

    Args:
        factor: 3 to 10; the norm of a healthy run seldom doubles.
        window: norms that are remembered.
        least: that many are needed before any is refused.
    """

    def __init__(self, factor: float, window: int = 32, least: int = 16) -> None:
        self.factor, self.least = factor, least
        self.norms: deque[float] = deque(maxlen=window)

    def refuses(self, norm: float) -> bool:
        """Judge a finite norm, and remember it."""
        spike = len(self.norms) >= self.least and norm > self.factor * median(self.norms)
        self.norms.append(norm)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as plain numbers."""
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.norms.clear()
        self.norms.extend(state["norms"])
