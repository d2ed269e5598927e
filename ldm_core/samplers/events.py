"""What a sampler tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepEvent:
    """One step, seen before it is taken.

    Attributes:
        index: of the step, from 0.
        t: 0-dim, the time the step starts from.
        x_t: (B, ...) the state there.
        x0: (B, ...) the present estimate of the data.
    """

    index: int
    t: Tensor
    x_t: Tensor
    x0: Tensor


OnStep = Callable[[StepEvent], None]
"""May raise to stop: samplers let the exception through as it is and hold nothing to give back."""
