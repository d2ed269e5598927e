"""The contract between networks and everything else: x0 = denoise(x_t, t, cond)."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import PURE_NOISE, Process, batch_time

Condition: TypeAlias = Any
"""A batch of whatever the network is conditioned on; only networks and guidance look inside."""

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x_t (B, ...), t (B,), cond) -> (B, ...), meaning what its `Prediction` says."""


class DenoiserLike(Protocol):
    """What objectives, guidance, samplers and distillers see. `t` is a number, 0-dim or (B,)."""

    @property
    def process(self) -> Process:
        """The process it was trained on."""
        ...

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The expected x0 given x_t: (B, ...) -> (B, ...)."""
        ...

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """dx_t/dt of the probability-flow ODE: (B, ...) -> (B, ...)."""
        ...


class Denoiser:
    """A network with the meaning of its output.

    One that predicts eps or the score is not asked at pure noise, where x0 would be 0 / 0: both
    methods refuse it with a ValueError.
    """

    def __init__(self, network: Network, process: Process, prediction: Prediction) -> None:
        self.network, self.process, self.prediction = network, process, prediction

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The expected x0 given x_t: (B, ...) -> (B, ...)."""
        return self._predict(x_t, t, cond, Prediction.X0)

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """dx_t/dt of the probability-flow ODE: (B, ...) -> (B, ...)."""
        return self._predict(x_t, t, cond, Prediction.VELOCITY)

    def _predict(
        self, x_t: Tensor, t: Tensor | float, cond: Condition, target: Prediction
    ) -> Tensor:
        t = batch_time(t, x_t)
        if self.prediction in (Prediction.EPS, Prediction.SCORE):
            self._refuse_pure_noise(t)
        value = self.network(x_t, t, cond)
        return convert(value, x_t, t, self.process, self.prediction, target).to(x_t.dtype)

    def _refuse_pure_noise(self, t: Tensor) -> None:
        """The noise in a state that is nothing else says nothing of the data."""
        undetermined = self.process.alpha(t) <= PURE_NOISE * self.process.sigma(t)
        if bool(undetermined.any()):
            raise ValueError(
                f"at t = {float(t[undetermined][0]):g} the state is pure noise, and a network that "
                f"predicts {self.prediction.value} says nothing of the data there: start the grid "
                "below, or train the network to predict velocity, v or x0"
            )
