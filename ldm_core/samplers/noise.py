"""Where a stochastic sampler's noise comes from: its caller, as a function without a state.

A `Noise` gives standard normal draw k. A `Brownian` gives increments of one path W, standardised,

    (W(t) - W(r)) / sqrt(t - r),

so that draws over a step and over a part of it are correlated as the SDE wants them, and grids of
any number of steps follow the same path.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from ldm_core import random

Noise: TypeAlias = Callable[[int], Tensor]
"""k -> (B, ...) standard normal; draws of different k are independent."""

Brownian: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(t, r), r < t -> (B, ...) standard normal, the standardised increment of a path over [r, t]."""

_DEEPEST = 32  # nodes of the tree are numbered by one 32-bit word of the counter


def counter_noise(seed: int, ids: Tensor, shape: tuple[int, ...]) -> Noise:
    """Draws that are a function of (seed, k, sample id).

    Args:
        seed: of the picture or the run.
        ids: (B,) int64 sample ids.
        shape: of one sample.

    Returns:
        k -> (B, *shape) float32 on the device of `ids`.
    """
    return lambda k: random.normal(seed, "sampler", k, ids, shape)


def seeded_noise(seeds: Sequence[int], like: Tensor) -> Noise:
    """Draws for pictures with a seed each, whatever else is drawn beside them.

    Args:
        seeds: B of them.
        like: (B, ...) the pictures' states; gives shape and device.
    """
    first = torch.zeros(1, dtype=torch.int64, device=like.device)
    draws = [counter_noise(seed, first, like.shape[1:]) for seed in seeds]
    return lambda k: torch.cat([draw(k) for draw in draws])


def seeded_path(seeds: Sequence[int], like: Tensor, end: float) -> Brownian:
    """Paths of pictures with a seed each; arguments as in `seeded_noise` and `BrownianPath`."""
    first = torch.zeros(1, dtype=torch.int64, device=like.device)
    paths = [BrownianPath(seed, first, like.shape[1:], end) for seed in seeds]
    return lambda t, r: torch.cat([path(t, r) for path in paths])


class BrownianPath:
    """A path over [0, end] by halving: W in the middle of [a, b] is the mean of its ends plus
    sqrt(b - a) / 2 z (Lévy's construction), z being a function of (seed, interval, sample id).

    Times are rounded to end / 2^depth. Increments are standardised by what was rounded to, so their
    variance is exactly 1 and increments side by side are independent.

    Attributes:
        seed: of the picture or the run.
        ids: (B,) int64 sample ids.
        shape: of one sample.
        end: of the process.
        depth: halvings, each a normal draw of the whole batch for every new time.
    """

    def __init__(
        self, seed: int, ids: Tensor, shape: tuple[int, ...], end: float, depth: int = 20
    ) -> None:
        """As the attributes.

        Raises:
            ValueError: a depth outside [0, 32].
        """
        if not 0 <= depth <= _DEEPEST:
            raise ValueError(f"a path is halved 0 to {_DEEPEST} times, got a depth of {depth}")
        self.seed, self.ids, self.shape, self.end, self.depth = seed, ids, shape, end, depth
        # A step asks for both ends twice, and the next one starts where it ends.
        self._recent = lru_cache(maxsize=3)(self._value)

    def __call__(self, t: Tensor, r: Tensor) -> Tensor:
        """The standardised increment over [r, t]: 0-dim times -> (B, *shape) float32.

        Raises:
            ValueError: a time outside [0, end], or two that the path does not tell apart.
        """
        high, low = self._cell(t), self._cell(r)
        if high <= low:
            raise ValueError(
                f"a path of depth {self.depth} over [0, {self.end:g}] has no increment from "
                f"{float(r):g} to {float(t):g}: the second is to be later, or the depth larger"
            )
        length = (high - low) / 2**self.depth
        return ((self._recent(high) - self._recent(low)) / length**0.5).float()

    def _cell(self, t: Tensor) -> int:
        """The rounded time in units of end / 2^depth."""
        share = float(t) / self.end
        if not 0 <= share <= 1 + 1e-6:  # as much as `check_grid` lets pass
            raise ValueError(f"this path covers [0, {self.end:g}], not {float(t):g}")
        return round(min(share, 1.0) * 2**self.depth)

    def _value(self, cell: int) -> Tensor:
        """W over a unit interval, float64: an increment is a small difference of it."""
        low, high, node = 0, 2**self.depth, 1
        at_high = self._normal(0)
        at_low = torch.zeros_like(at_high)
        while low < cell < high:
            middle, span = (low + high) // 2, (high - low) / 2**self.depth
            at_middle = (at_low + at_high) / 2 + span**0.5 / 2 * self._normal(node)
            if cell < middle:
                high, at_high, node = middle, at_middle, 2 * node
            else:
                low, at_low, node = middle, at_middle, 2 * node + 1
        return at_low if cell == low else at_high

    def _normal(self, node: int) -> Tensor:
        return random.normal(self.seed, "brownian", node, self.ids, self.shape).double()
