"""The contract of few-step students: x_r = x_t - (t - r) u(x_t, t, r, cond)."""

from collections.abc import Callable

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition
from ldm_core.diffusion.process import batch_time

AverageVelocity = Callable[[Tensor, Tensor, Tensor, Condition], Tensor]
"""u(x_t (B, ...), t, r, cond): the mean of v along the ODE over [r, t]; times (B,) or 0-dim."""

TwoTimeNetwork = Callable[[Tensor, Tensor, Condition, Tensor], Tensor]
"""(x_t (B, ...), t (B,), cond, r (B,)) -> (B, ...), as `DiT.forward` with flow_map=True."""


class FlowMap:
    """A two-time network as an average velocity (Boffi et al. 2025; Geng et al. 2025, Eq. 3)."""

    def __init__(self, network: TwoTimeNetwork) -> None:
        self.network = network

    def __call__(
        self, x_t: Tensor, t: Tensor | float, r: Tensor | float, cond: Condition
    ) -> Tensor:
        """u(x_t, t, r): (B, ...) -> (B, ...); times are numbers, 0-dim or (B,)."""
        return self.network(x_t, batch_time(t, x_t), cond, batch_time(r, x_t))
