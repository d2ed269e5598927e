"""Inpainting with a network that was never trained to: the known region is put in, noised to the
present level, before every step (Song et al. 2021, App. I.2); and steps are repeated after going
back to their noise level, so that the unknown region comes to agree with it (RePaint, Lugmayr et
al. 2022, Alg. 1 with jumps of one step).

Without repetition the unknown region only ever sees noisy versions of the known one, and the result
is no sample of the conditional distribution however many steps there are. For Gaussian data of
covariance S, the k known given, repeating the last step (t to 0, x_t to D) leaves in the limit a
mean of

    S_uk (S_kk + sigma_t^2 / alpha_t^2)^-1 x_k     instead of     S_uk S_kk^-1 x_k,

which is right as the last t becomes small.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm_core.conditioning.inpainting import check_mask
from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.process import Process, add_noise
from ldm_core.samplers import Sampler
from ldm_core.samplers.events import OnStep, watched


def sample_replacement(
    sampler: Sampler,
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    x0: Tensor,
    known: Tensor,
    noise: Callable[[Tensor], Tensor],
    repeats: int = 1,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample step by step, replacing what is known before each.

    Args:
        sampler: any that keeps nothing from one step to the next; called with grids of one step, so
            that each asks for its draw 0: one that draws noise must get it afresh at every call.
        denoiser: unconditional, or conditioned on `cond`.
        x_T: (B, C, ...) state at grid[0].
        grid: (steps + 1,) decreasing times.
        cond: B conditions.
        x0: (B, C, ...) what is known; what it is elsewhere does not matter.
        known: (B, 1, ...) 1 where `x0` is given, 0 where it is to be painted.
        noise: gives fresh standard normal noise of its argument's shape, as `torch.randn_like`.
        repeats: how often each step is taken; 1 is plain replacement.
        on_step: called by the sampler, each repeat of a step with the step's index in `grid`.

    Returns:
        (B, C, ...), exactly `x0` where it is known.

    Raises:
        ValueError: shapes that do not fit, a grid that is none, or less than one repeat.
    """
    check_grid(grid, denoiser.process)
    check_mask(x0, known)
    if x_T.shape != x0.shape:
        raise ValueError(f"state {tuple(x_T.shape)} and latent {tuple(x0.shape)} differ in shape")
    if repeats < 1:
        raise ValueError(f"every step is taken at least once, got repeats = {repeats}")
    inside, x = known > 0, x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        step = watched(sampler, on_step, index)
        for repeat in range(repeats):
            if repeat:
                x = renoise(denoiser.process, x, r, t, noise(x))
            x = torch.where(inside, add_noise(denoiser.process, x0, noise(x), t), x)
            x = step(denoiser, x, torch.stack([t, r]), cond)
    return torch.where(inside, x0, x)


def renoise(process: Process, x_r: Tensor, r: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """From r back to t > r by the forward process: x_t = a x_r + sqrt(sigma_t^2 - a^2 sigma_r^2)
    eps with a = alpha_t / alpha_r.
    """
    a = process.alpha(t) / process.alpha(r)
    variance = process.sigma(t).square() - (a * process.sigma(r)).square()
    return a * x_r + variance.clamp(min=0).sqrt() * eps
