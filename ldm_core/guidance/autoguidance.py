"""Autoguidance: a model is led away from a bad version of itself (Karras et al. 2024).

    D_w = D_bad + w (D_good - D_bad)

The bad model is smaller or trained for less, under the same condition, so its density is wider
around the same data; no empty caption is needed. `Guided(WeakPair(denoiser, weak), w)`.
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import Process
from ldm_core.guidance.guided import estimate


class WeakPair:
    """A denoiser beside a weaker one of the same process; a pass each."""

    def __init__(self, denoiser: DenoiserLike, weak: DenoiserLike) -> None:
        """Pair them.

        Raises:
            ValueError: their processes have different noise at the same time, or different ends.
        """
        _check_same_levels(denoiser.process, weak.process)
        self.good, self.weak = denoiser, weak

    def both(
        self, x_t: Tensor, t: Tensor | float, cond: Condition, target: Prediction
    ) -> tuple[Tensor, Tensor]:
        """The stronger and the weaker one's estimate."""
        ask = x_t, t, cond, target
        return estimate(self.good, *ask), estimate(self.weak, *ask)


def _check_same_levels(process: Process, weak: Process) -> None:
    """Compare alpha and sigma halfway, where processes of different kinds differ, and the ends."""
    t = torch.tensor(process.end / 2, dtype=torch.float64)
    ours, theirs = ((float(p.alpha(t)), float(p.sigma(t))) for p in (process, weak))
    if max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 1e-6 * max(ours):
        raise ValueError(
            f"at t = {float(t):g} the denoiser's (alpha, sigma) are {ours} and the weak one's "
            f"{theirs}: guide with a model trained on the same process"
        )
    if abs(process.end - weak.end) > 1e-6 * process.end:
        raise ValueError(
            f"the denoiser's process ends at t = {process.end:g} and the weak one's at "
            f"{weak.end:g}: guide with a model trained on the same process"
        )
