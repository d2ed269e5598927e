"""A denoiser made of two estimates, a good and a bad one: what most guidances have in common.

    D_w = rule(D_good, D_bad, w),   and D_1 = D_good

A pair makes the two estimates: with and without the caption, by a strong and a weak model, at the
end and in the middle of one network. A rule combines them, in the space it is defined in: a linear
one is the same in all, since every prediction is affine in x0; others are not. Where no sample is
guided (w = 1 or t outside the interval) only the good estimate is made.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, batch_time, over_dimensions

Interval = tuple[float, float]
"""(low, high) times, both included."""

EVERYWHERE: Interval = (0.0, math.inf)


class Pair(Protocol):
    """A good denoiser, and how it is asked together with a bad one."""

    @property
    def good(self) -> DenoiserLike:
        """The good one alone."""
        ...

    def both(
        self, x_t: Tensor, t: Tensor | float, cond: Condition, target: Prediction
    ) -> tuple[Tensor, Tensor]:
        """The good and the bad estimate of X0 or VELOCITY, each (B, ...)."""
        ...


class Rule(Protocol):
    """How the two are combined; (good, bad, scale, t) -> (B, ...), and good where scale is 1."""

    @property
    def space(self) -> Prediction | None:
        """X0 or VELOCITY, whichever it is defined on; None if that makes no difference."""
        ...

    def __call__(self, good: Tensor, bad: Tensor, scale: Tensor, t: Tensor) -> Tensor:
        """Estimates (B, ...), at least float32; scale 0-dim or (B, 1, ...), t (B, 1, ...)."""
        ...


class Linear:
    """D_bad + w (D_good - D_bad)."""

    space = None

    def __call__(self, good: Tensor, bad: Tensor, scale: Tensor, t: Tensor) -> Tensor:
        """(B, ...), whatever the space."""
        return bad + scale * (good - bad)


LINEAR = Linear()


class Guided:
    """A denoiser: the good one of a pair, led away from the bad one."""

    def __init__(
        self,
        pair: Pair,
        scale: float | Tensor,
        rule: Rule = LINEAR,
        interval: Interval = EVERYWHERE,
    ) -> None:
        """`scale` w, one number or one per sample (B,); `interval` outside which w is 1.

        Raises:
            ValueError: as `check_interval`.
        """
        check_interval(interval)
        self.pair, self.scale, self.rule, self.interval = pair, scale, rule, interval

    @property
    def process(self) -> Process:
        """The good denoiser's."""
        return self.pair.good.process

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The guided x0: (B, ...) -> (B, ...)."""
        return self.beside_good(x_t, t, cond, Prediction.X0)[0]

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The guided velocity: (B, ...) -> (B, ...)."""
        return self.beside_good(x_t, t, cond, Prediction.VELOCITY)[0]

    def beside_good(
        self, x_t: Tensor, t: Tensor | float, cond: Condition, target: Prediction
    ) -> tuple[Tensor, Tensor]:
        """The guided estimate of X0 or VELOCITY and, at no further cost, the good one."""
        scale = scale_at(self.scale, x_t, t, self.interval, outside=1.0)
        if not bool((scale != 1).any()):
            plain = estimate(self.pair.good, x_t, t, cond, target)
            return plain, plain
        space = self.rule.space or target
        good, bad = self.pair.both(x_t, t, cond, space)
        times = batch_time(t, x_t)
        wide = torch.promote_types(good.dtype, torch.float32)
        guided = self.rule(
            good.to(wide),
            bad.to(wide),
            over_dimensions(scale.to(good.device, wide), good),
            over_dimensions(times, good),
        ).to(good.dtype)
        return (
            convert(guided, x_t, times, self.process, space, target).to(x_t.dtype),
            convert(good, x_t, times, self.process, space, target).to(x_t.dtype),
        )


def estimate(
    denoiser: DenoiserLike, x_t: Tensor, t: Tensor | float, cond: Condition, target: Prediction
) -> Tensor:
    """What a denoiser says of X0 or VELOCITY, without a conversion after it."""
    assert target in (Prediction.X0, Prediction.VELOCITY), target
    ask = denoiser.denoise if target is Prediction.X0 else denoiser.velocity
    return ask(x_t, t, cond)


def scale_at(
    scale: float | Tensor, x_t: Tensor, t: Tensor | float, interval: Interval, outside: float
) -> Tensor:
    """The scale where t lies in the interval, else `outside`: 0-dim or (B,), at least float32.

    Raises:
        ValueError: as many scales as samples are needed, and there are not.
    """
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    scale = torch.as_tensor(scale, dtype=torch.promote_types(x_t.dtype, torch.float32))
    if scale.ndim and len(scale) != len(x_t):
        raise ValueError(
            f"{len(scale)} guidance scales for a batch of {len(x_t)}: give one number, or one per "
            "sample to the outermost guidance alone, since it may double the batch of inner ones"
        )
    low, high = interval
    return torch.where((t >= low) & (t <= high), scale.to(t.device), outside)


def check_interval(interval: Interval) -> None:
    """Refuse an interval that no time lies in.

    Raises:
        ValueError: it runs from the later to the earlier time, or an end is no number.
    """
    low, high = interval
    if not low <= high:
        raise ValueError(
            f"no time lies in the interval of guidance ({low:g}, {high:g}): give the earlier time, "
            "the one nearer to the data, first; scale 1 guides nowhere"
        )


def sum_over_sample(x: Tensor) -> Tensor:
    """Sum over all but the batch dimension, which stay as ones: (B, ...) -> (B, 1, ..., 1)."""
    return x.sum(dim=tuple(range(1, x.ndim)), keepdim=True)
