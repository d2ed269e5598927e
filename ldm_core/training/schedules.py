"""Learning-rate schedules: multipliers of the base rate as functions of the step.

All rise linearly over the first `warmup` steps, and none is 0 at any step of the run.
"""

import math


def warmup_then_constant(step: int, warmup: int) -> float:
    """Up over `warmup` steps, then 1: for runs without an end, with an average of the weights."""
    return min(1.0, (step + 1) / max(warmup, 1))


def warmup_then_cosine(step: int, steps: int, warmup: int, least: float = 0.0) -> float:
    """Up, then half a cosine down to `least` (Loshchilov & Hutter 2017, Eq. 5, one period)."""
    if step < warmup:
        return warmup_then_constant(step, warmup)
    share = (step - warmup) / max(steps - warmup, 1)
    return least + (1 - least) * (1 + math.cos(math.pi * share)) / 2


def warmup_then_decay(step: int, steps: int, warmup: int, decay_fraction: float) -> float:
    """A trapezoid, or WSD (Hu et al. 2024): up, flat, linearly down over the last fraction."""
    down = min(1.0, (steps - step) / max(decay_fraction * steps, 1.0))
    return min(warmup_then_constant(step, warmup), down)
