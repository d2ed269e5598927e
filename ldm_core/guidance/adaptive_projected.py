"""Adaptive projected guidance (Sadat et al. 2024, "Eliminating oversaturation ...", Algorithm 1).

    delta = (D_c - D_u) + beta delta_before            momentum, beta < 0 against it
    delta = delta min(1, r / ||delta||)                no longer than r
    D_w   = D_c + (w - 1) (delta_orthogonal + eta delta_parallel)       to D_c

in x0 space: the part along D_c is what saturates colours. eta = 1 without limit and momentum is
classifier-free guidance.
"""

import math

import torch
from torch import Tensor

from ldm_core.diffusion.prediction import Prediction
from ldm_core.guidance.guided import sum_over_sample


class AdaptiveProjection:
    """A rule for `Guided`; with momentum it remembers one trajectory, so make one for each."""

    space = Prediction.X0

    def __init__(self, eta: float = 0.0, longest: float = math.inf, momentum: float = 0.0) -> None:
        """Choose what is left of the difference.

        Args:
            eta: share kept of the part parallel to the conditional x0.
            longest: r, the length over all of a sample's dimensions; inf does not limit it.
            momentum: beta.
        """
        self.eta, self.longest, self.momentum = eta, longest, momentum
        self._t = torch.tensor(math.inf)  # of the last call
        self._before = torch.zeros(())  # delta over the times before that
        self._delta = torch.zeros(())  # delta at that time

    def __call__(self, good: Tensor, bad: Tensor, scale: Tensor, t: Tensor) -> Tensor:
        """(B, ...) x0 each -> (B, ...)."""
        delta = good - bad
        if self.momentum:
            delta = self._remember(delta, t)
        length = sum_over_sample(delta.square()).sqrt()
        delta = delta * (self.longest / length.clamp(min=1e-12)).clamp(max=1)
        along = sum_over_sample(delta * good) / sum_over_sample(good.square()).clamp(min=1e-24)
        return good + (scale - 1) * (delta + (self.eta - 1) * along * good)

    def _remember(self, delta: Tensor, t: Tensor) -> Tensor:
        """Add up over times; a second call at one time, as Heun's method makes, replaces the first.

        Raises:
            ValueError: the time rises, so this is another trajectory or one that goes back.
        """
        last = self._t.to(t.device)
        if bool((t > last).any()):
            raise ValueError(
                f"momentum remembers a trajectory that came to t = {float(last.min()):g} and was "
                f"asked at {float(t.max()):g}: make an AdaptiveProjection for every trajectory, "
                "and none with momentum for samplers that go back to more noise"
            )
        before, latest = self._before.to(delta.device), self._delta.to(delta.device)
        self._before = torch.where(t < last, latest, before)
        self._t, self._delta = t, delta + self.momentum * self._before
        return self._delta
