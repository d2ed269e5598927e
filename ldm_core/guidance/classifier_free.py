"""Classifier-free guidance (Ho & Salimans 2022), restricted to an interval of noise levels
(Kynkäänniemi et al. 2024, Eq. 5).
"""

import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import DenoiserLike
from ldm_core.diffusion.process import Process, batch_time, over_dimensions


class ClassifierFreeGuidance:
    """A denoiser made of a denoiser: D_u + w (D_c - D_u) for t inside `interval`, else D_c.

    Conditional and unconditional passes share one batch; where no sample is guided (scale 1 or t
    outside) there is only the conditional pass.

    Attributes:
        denoiser: trained with captions dropped at random.
        scale: w, one number or one per sample (B,); 1 is the plain conditional model.
        null: the empty caption, a batch of 1 or B.
        interval: (low, high) times, both included.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: float | Tensor,
        null: TextCondition,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.denoiser, self.scale, self.null, self.interval = denoiser, scale, null, interval

    @property
    def process(self) -> Process:
        """The wrapped denoiser's."""
        return self.denoiser.process

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: TextCondition) -> Tensor:
        """The guided x0: (B, ...) -> (B, ...)."""
        scale = self._scale_at(t)
        if not _guided(scale):
            return self.denoiser.denoise(x_t, t, cond)
        return _combine(self.denoiser.denoise(*self._doubled(x_t, t, cond)), scale)

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: TextCondition) -> Tensor:
        """The guided velocity; being affine in x0, it is guided by the same formula."""
        scale = self._scale_at(t)
        if not _guided(scale):
            return self.denoiser.velocity(x_t, t, cond)
        return _combine(self.denoiser.velocity(*self._doubled(x_t, t, cond)), scale)

    def _scale_at(self, t: Tensor | float) -> Tensor:
        """w inside the interval and 1 outside, 0-dim or (B,)."""
        t, scale = torch.as_tensor(t), torch.as_tensor(self.scale)
        low, high = self.interval
        return torch.where((t >= low) & (t <= high), scale.to(t.device), 1.0)

    def _doubled(
        self, x_t: Tensor, t: Tensor | float, cond: TextCondition
    ) -> tuple[Tensor, Tensor, TextCondition]:
        """The batch twice: first under its conditions, then under the null condition."""
        both = TextCondition.cat([cond, self.null.expand(len(x_t))])
        return torch.cat([x_t, x_t]), batch_time(t, x_t).repeat(2), both


def _guided(scale: Tensor) -> bool:
    return bool((scale != 1).any())


def _combine(both: Tensor, scale: Tensor) -> Tensor:
    """D_u + w (D_c - D_u) from conditional and unconditional halves: (2B, ...) -> (B, ...)."""
    conditional, unconditional = both.chunk(2)
    scale = over_dimensions(scale, conditional).to(both.device, both.dtype)
    return unconditional + scale * (conditional - unconditional)
