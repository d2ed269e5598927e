"""CFG-Zero* (Fan et al. 2025, Algorithm 1): two remedies for velocities that are not yet exact.

    s* = <v_c, v_u> / ||v_u||^2,   v_w = s* v_u + w (v_c - s* v_u)        optimised scale
    v = 0 in the first steps                                             zero-init

The first is a rule for two velocities, of each sample by itself; the second works on any denoiser.
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, batch_time, over_dimensions
from ldm_core.guidance.guided import sum_over_sample


class ZeroStar:
    """The optimised scale, a rule for `Guided`: v_u is first made as long as it explains v_c."""

    space = Prediction.VELOCITY

    def __call__(self, good: Tensor, bad: Tensor, scale: Tensor, t: Tensor) -> Tensor:
        """(B, ...) velocities each -> (B, ...)."""
        best = sum_over_sample(good * bad) / sum_over_sample(bad.square()).clamp(min=1e-24)
        return best * bad + scale * (good - best * bad)


class ZeroInit:
    """A denoiser whose velocity is zero from `first` on towards noise, where no network is asked.

    With `first = grid[k - 1]` the first k steps of Euler's method on that grid stay where they are.
    """

    def __init__(self, denoiser: DenoiserLike, first: float) -> None:
        self.denoiser, self.first = denoiser, first

    @property
    def process(self) -> Process:
        """The wrapped denoiser's."""
        return self.denoiser.process

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The x0 that belongs to the velocity: on a flow x_t itself, where that is zero."""
        zero, times = self._zero(x_t, t), batch_time(t, x_t)
        none = torch.zeros_like(x_t)
        still = convert(none, x_t, times, self.process, Prediction.VELOCITY, Prediction.X0)
        if bool(zero.all()):
            return still
        return torch.where(over_dimensions(zero, x_t), still, self.denoiser.denoise(x_t, t, cond))

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """(B, ...) -> (B, ...)."""
        zero = self._zero(x_t, t)
        if bool(zero.all()):
            return torch.zeros_like(x_t)
        return torch.where(over_dimensions(zero, x_t), 0, self.denoiser.velocity(x_t, t, cond))

    def _zero(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Which samples stay where they are: (B,)."""
        return batch_time(t, x_t) >= self.first
