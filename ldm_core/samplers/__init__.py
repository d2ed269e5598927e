"""Denoiser + grid -> x0, one short function each."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike

Sampler: TypeAlias = Callable[[DenoiserLike, Tensor, Tensor, Condition], Tensor]
"""(denoiser, x_T (B, ...), grid, cond) -> x0, as `sample_euler`; options of its own by
`functools.partial`."""
