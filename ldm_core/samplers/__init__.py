"""Denoiser + grid -> x0, one short function each."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Sampler: TypeAlias = Callable[..., Tensor]
"""(denoiser, x_T (B, ...), grid, cond) -> x0, as `sample_euler`; options of its own by
`functools.partial`. To be watched, it takes the keyword `on_step`."""
