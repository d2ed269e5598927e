"""What a sampler tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from ldm_core.samplers import Sampler


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


def watched(sampler: Sampler, on_step: OnStep | None, first: int = 0) -> Sampler:
    """The sampler with `on_step` told of its steps, counted from `first`; as it is without one."""
    if on_step is None:
        return sampler

    def tell(event: StepEvent) -> None:
        on_step(replace(event, index=first + event.index))

    return partial(sampler, on_step=tell)
