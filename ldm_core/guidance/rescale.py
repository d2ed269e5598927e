"""Guidance rescale: the guided velocity with the plain one's spread (Lin et al. 2024, Eq. 15-16).

    v' = v_w std(v_c) / std(v_w),   then phi v' + (1 - phi) v_w

What comes out depends on what is rescaled. The paper's v-prediction and the velocity differ by a
factor that cancels in std(v_c) / std(v_w) on every process on the circle, and on a flow the
velocity is what networks predict, so it is the velocity here.
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, batch_time
from ldm_core.guidance.guided import Guided


class Rescaled:
    """A denoiser made of a guided one, which is asked once."""

    def __init__(self, guided: Guided, strength: float) -> None:
        """`strength` phi: 0 leaves the guided estimate alone, 1 gives it the plain one's spread."""
        self.guided, self.strength = guided, strength

    @property
    def process(self) -> Process:
        """The guided one's."""
        return self.guided.process

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The x0 that belongs to the rescaled velocity."""
        v = self.velocity(x_t, t, cond)
        times = batch_time(t, x_t)
        return convert(v, x_t, times, self.process, Prediction.VELOCITY, Prediction.X0)

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The rescaled velocity: (B, ...) -> (B, ...); exactly the plain one where unguided."""
        guided, plain = self.guided.beside_good(x_t, t, cond, Prediction.VELOCITY)
        ratio = _spread(plain) / _spread(guided).clamp(min=1e-12)
        return guided * (1 + self.strength * (ratio - 1)).to(guided.dtype)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation over all but the batch dimension, for a video over frames too."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.std(dim=tuple(range(1, x.ndim)), correction=0, keepdim=True)
