"""How sure a measured accuracy is, and what guessing would reach."""

import itertools
import math
from typing import Literal

from ldm_core.errors import UserError
from ldm_core.media.shapes import (
    BACKGROUNDS,
    COLORS,
    PAIR_SIZES,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
)


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; the default z covers 95 %.

    Unlike p +- z sd it stays within [0, 1] and is honest at 0 and at all successes.

    Raises:
        UserError: no trials, or successes not in 0..trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise UserError(f"{successes} successes in {trials} trials; need 0 <= successes <= trials")
    rate = successes / trials
    center = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    spread = math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    half = z * spread / (1 + z**2 / trials)
    return max(0.0, center - half), min(1.0, center + half)


def chance_levels(kind: Literal["single", "double"] = "single") -> dict[str, float]:
    """Probability that a drawn scene of this kind agrees with an unrelated one, by attribute.

    These are what a model that ignores its caption, yet draws good scenes, would score.
    """
    levels = {"background": 1 / len(BACKGROUNDS), "count": 1.0}
    if kind == "single":
        return levels | {
            "color": 1 / len(COLORS),
            "shape": 1 / len(SHAPES),
            "size": 1 / len(SIZES),
            "position": 1 / len(POSITIONS),
        }
    kinds = len(COLORS) * len(SHAPES)
    return levels | {
        "color": _same_pair(len(COLORS), len(SHAPES)),
        "shape": _same_pair(len(SHAPES), len(COLORS)),
        "size": 1 / len(PAIR_SIZES),
        "position": 1 / len(RELATIONS),
        "both": 1 / math.comb(kinds, 2),
    }


def _same_pair(values: int, others: int) -> float:
    """Chance that two pairs of different objects show the same two values, in any order.

    An object is one of values x others kinds; a pair is drawn without replacement.
    """
    ordered = values * others * (values * others - 1)
    # Unordered pairs of values: equal ones leave others - 1 choices for the second object.
    pairs = itertools.combinations_with_replacement(range(values), 2)
    ways = [others * (others - 1) if a == b else 2 * others**2 for a, b in pairs]
    return sum((way / ordered) ** 2 for way in ways)
