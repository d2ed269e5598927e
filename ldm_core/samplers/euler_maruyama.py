"""Euler's method on the reverse SDE: weak order 1, one evaluation per step."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process, squared_diffusion
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Noise

Diffusion = Callable[[Process, Tensor], Tensor]
"""(process, t) -> w_t, the squared diffusion of the SDE that is sampled; same shape as t."""


def sample_euler_maruyama(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    diffusion: Diffusion = squared_diffusion,
) -> Tensor:
    """x_r = x_t - (t - r) (v - w / 2 score) + sqrt(w (t - r)) z.

    For every w_t >= 0 the SDE dx = (v - w / 2 score) dt + sqrt(w) dW, backwards in time, has the
    marginals of the process (Song et al. 2021b, Eq. 6 where w = g^2; Ma et al. 2024, SiT). A step
    to t = 0 ends at the estimate of the data, without noise.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        denoiser: gives the velocity.
        noise: draw k is for step k.
        diffusion: gives w_t; 0 is the ODE. The forward SDE's own, g^2, is infinite at pure noise.

    Raises:
        ValueError: w infinite or negative on the grid.
    """
    process, x = denoiser.process, x_T
    check_grid(grid, process)
    rates = diffusion(process, grid[:-1].double())
    wrong = (~rates.isfinite() | (rates < 0)).nonzero()
    if len(wrong):
        raise ValueError(
            f"the SDE diffuses at a rate of {rates[wrong[0, 0]]:g} at t = {grid[wrong[0, 0]]:g}: "
            "start the grid below pure noise, or give a diffusion that is finite there"
        )
    for index, (t, r) in enumerate(pairwise(grid)):
        v = denoiser.velocity(x, t, cond)
        x0 = convert(v, x, t, process, Prediction.VELOCITY, Prediction.X0)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        if r == 0:
            return x0
        score = convert(v, x, t, process, Prediction.VELOCITY, Prediction.SCORE)
        w = rates[index]
        drawn = (w * (t - r)).sqrt() * noise(index).to(x.dtype)
        x = x - (t - r) * (v - w / 2 * score) + drawn
    return x
