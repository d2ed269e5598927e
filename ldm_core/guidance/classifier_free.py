"""Classifier-free guidance (Ho & Salimans 2022), restricted to an interval of noise levels
(Kynkäänniemi et al. 2024, Eq. 5).

Two conventions are in use for the scale; ours, w, is the first:

    D_u + w (D_c - D_u)            w = 0: unconditional     w = 1: conditional
    (1 + w') D_c - w' D_u          w' = -1                  w' = 0        (Ho & Salimans, Eq. 6)
"""

import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import DenoiserLike
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import batch_time
from ldm_core.guidance.guided import EVERYWHERE, LINEAR, Guided, Interval, Rule, estimate


class NullPair:
    """A denoiser with its own estimate under the empty caption; both passes share one batch."""

    def __init__(self, denoiser: DenoiserLike, null: TextCondition | None) -> None:
        """`denoiser` trained with captions dropped; `null` the empty one, a batch of 1 or B.

        Raises:
            ValueError: `null` is None.
        """
        if null is None:
            model = type(getattr(denoiser, "network", denoiser)).__name__
            raise ValueError(
                f"{model} has no null condition, which classifier-free guidance compares with: "
                "train it with captions dropped and give the empty caption, or use scale 1, a "
                "weaker model (WeakPair) or a classifier (ClassifierGuidance)"
            )
        self.good, self.null = denoiser, null

    def both(
        self, x_t: Tensor, t: Tensor | float, cond: TextCondition, target: Prediction
    ) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional estimate, from one batch of 2B."""
        twice = torch.cat([x_t, x_t]), batch_time(t, x_t).repeat(2)
        # a batch of conditions, or labels (B,)
        join = torch.cat if isinstance(cond, Tensor) else type(cond).cat
        conditions = join([cond, self.null.expand(len(x_t))])
        conditional, unconditional = estimate(self.good, *twice, conditions, target).chunk(2)
        return conditional, unconditional


class ClassifierFreeGuidance(Guided):
    """A denoiser made of a denoiser: D_u + w (D_c - D_u) for t inside `interval`, else D_c."""

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float | Tensor,
        null: TextCondition | None,
        interval: Interval = EVERYWHERE,
        rule: Rule = LINEAR,
    ) -> None:
        """Guide `denoiser`.

        Args:
            denoiser: trained with captions dropped at random.
            scale: w, one number or one per sample (B,); 1 is the plain conditional model.
            null: the empty caption, a batch of 1 or B.
            interval: times, as they are or from `log_sigma_interval`.
            rule: how the two estimates are combined: `Linear`, `AdaptiveProjection`, `ZeroStar`.

        Raises:
            ValueError: `null` is None.
        """
        super().__init__(NullPair(denoiser, null), scale, rule, interval)


def from_ho_salimans(scale: float | Tensor) -> float | Tensor:
    """w = w' + 1, from the w' of (1 + w') D_c - w' D_u."""
    return scale + 1


def to_ho_salimans(scale: float | Tensor) -> float | Tensor:
    """w' = w - 1, for the w of D_u + w (D_c - D_u)."""
    return scale - 1
