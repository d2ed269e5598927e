"""Midpoint methods in lambda = ln(alpha / sigma): order 2, two evaluations per step, no memory.

DPM-Solver-2 holds eps over a step and DPM-Solver++(2S) the data; either is evaluated halfway in
lambda, at a state that DDIM leads to. A step from pure noise or to pure data has no such half and
is DDIM's, of one evaluation.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import Process
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.exponential import ddim_step, level


def sample_dpm_solver_2(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
) -> Tensor:
    """x_r = alpha_r / alpha_t x_t - sigma_r (e^h - 1) eps(x_s, s), s halfway (Lu et al. 2022,
    Algorithm 1 with r_1 = 1/2).

    Arguments, result and errors as in `sample_ddim`; n steps down to 0 cost 2n - 1 evaluations.
    """
    check_grid(grid, denoiser.process)
    process, x = denoiser.process, x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x_r = ddim_step(process, x, x0, t, r)
        s = halfway(process, t, r)
        if s is not None:
            x_s = ddim_step(process, x, x0, t, s)
            x0_s = denoiser.denoise(x_s, s, cond)
            eps = convert(x0, x, t, process, Prediction.X0, Prediction.EPS)
            eps_s = convert(x0_s, x_s, s, process, Prediction.X0, Prediction.EPS)
            h = level(process, r) - level(process, t)
            x_r = x_r - process.sigma(r) * torch.expm1(h) * (eps_s - eps)
        x = x_r
    return x


def sample_dpmpp_2s(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
) -> Tensor:
    """x_r = sigma_r / sigma_t x_t + alpha_r (1 - e^-h) D(x_s, s), s halfway (Lu et al. 2022b,
    Algorithm 1 with r_1 = 1/2).

    Arguments, result and errors as in `sample_ddim`; n steps down to 0 cost 2n - 1 evaluations.
    """
    check_grid(grid, denoiser.process)
    x = x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x = midpoint_step(denoiser, x, x0, t, r, cond)
    return x


def midpoint_step(
    denoiser: DenoiserLike, x: Tensor, x0: Tensor, t: Tensor, r: Tensor, cond: Condition
) -> Tensor:
    """One step of DPM-Solver++(2S) from x (B, ...) at t, where x0 is known, to r."""
    process = denoiser.process
    s = halfway(process, t, r)
    if s is not None:
        x0 = denoiser.denoise(ddim_step(process, x, x0, t, s), s, cond)
    return ddim_step(process, x, x0, t, r)


def halfway(process: Process, t: Tensor, r: Tensor) -> Tensor | None:
    """The time halfway in lambda, or None if lambda is infinite at either end."""
    middle = (level(process, t) + level(process, r)) / 2
    return process.time_of(middle) if middle.isfinite() else None
