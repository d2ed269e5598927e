"""What a verification counts: of each rule how often it was asked, and where it did not hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHOWN = 5

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """How a rule fared.

    Attributes:
        rule: what is to hold.
        checked: of how many things it was asked; of none if it could not be, which `note` explains.
        failed: of how many it did not hold.
        first: the first `SHOWN` of those, each with what is wrong.
        note: what else is to be known.
    """

    rule: str
    checked: int
    failed: int
    first: tuple[str, ...]
    note: str = ""


class Tally:
    """Counts for one rule while the rows go by."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self._checked = self._failed = 0
        self._first: list[str] = []

    def ask(self, name: object, problem: str) -> bool:
        """Count one thing; returns whether the rule holds for it, which is without a problem."""
        self._checked += 1
        if problem:
            self._failed += 1
            if len(self._first) < SHOWN:
                self._first.append(f"{name}: {problem}")
        return not problem

    def check(self, note: str = "") -> Check:
        """What was counted."""
        return Check(self.rule, self._checked, self._failed, tuple(self._first), note)


# Problems, in words; none is an empty text


def not_finite(arrays: Sequence[np.ndarray]) -> str:
    """How many values are no numbers."""
    bad = sum(int((~np.isfinite(array)).sum()) for array in arrays)
    return f"{bad} values are NaN or infinite" if bad else ""


def differs(found: object, wanted: object) -> str:
    """What was found instead of what the manifest says."""
    return "" if found == wanted else f"{found}, the manifest says {wanted}"
