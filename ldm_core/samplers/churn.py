"""EDM's stochastic sampler: noise up a little, then Heun's method down the ODE."""

import math
from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, half_log_snr
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Noise
from ldm_core.samplers.transition import noise_ratio, noise_to_signal


def sample_churn(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    churn: float = 40.0,
    interval: tuple[float, float] = (0.0, math.inf),
    noise_scale: float = 1.0,
) -> Tensor:
    """Karras et al. 2022, Algorithm 2, with noise levels sigma / alpha: up from t to
    (1 + gamma) of its level, gamma = min(churn / steps, sqrt 2 - 1), then as `sample_heun` to r.
    A step to t = 0 ends at the estimate of the data.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        denoiser: gives the velocity.
        on_step: called after noise was added and before the step down.
        noise: draw k is for step k.
        churn: S_churn; 0 is the ODE.
        interval: (S_tmin, S_tmax), levels to add noise at, both included. Where the first is among
            them, noise rises above the grid's own first level.
        noise_scale: S_noise.

    Raises:
        ValueError: churn below 0.
    """
    if not churn >= 0:
        raise ValueError(f"churn is 0 (the ODE) or more, got {churn:g}")
    process, x = denoiser.process, x_T
    check_grid(grid, process)
    gamma = min(churn / (len(grid) - 1), math.sqrt(2) - 1)
    low, high = interval
    for index, (t, r) in enumerate(pairwise(grid)):
        level = noise_to_signal(process, t)
        if gamma > 0 and low <= level <= high and level.isfinite():
            x, t = _noise_up(process, x, t, gamma, noise_scale * noise(index))
        v = denoiser.velocity(x, t, cond)
        x0 = convert(v, x, t, process, Prediction.VELOCITY, Prediction.X0)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        if r == 0:
            return x0
        v_r = denoiser.velocity(x - (t - r) * v, r, cond)
        x = x - (t - r) * (v + v_r) / 2
    return x


def _noise_up(
    process: Process, x: Tensor, t: Tensor, gamma: float, z: Tensor
) -> tuple[Tensor, Tensor]:
    """A state and time at (1 + gamma) of the level at t, by the forward process."""
    t = t.double()
    t_hat = process.time_of(half_log_snr(process, t) - math.log1p(gamma))
    added = process.sigma(t_hat) * (1 - noise_ratio(process, t_hat, t).square()).sqrt()
    return process.alpha(t_hat) / process.alpha(t) * x + added * z.to(x.dtype), t_hat
