"""DDPM's reverse chain and DDIM's family of them, from the ODE to DDPM: order 1."""

from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Noise
from ldm_core.samplers.transition import (
    ancestral_share,
    noise_ratio,
    transition,
    transition_mean,
)

Variance = Literal["fixed_small", "fixed_large"]


def sample_ddpm(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    variance: Variance = "fixed_small",
    noisy_end: bool = False,
) -> Tensor:
    """x_r ~ N(mean of q(x_r | x_t, x0), variance) (Ho et al. 2020, Algorithm 2 and Eq. 7), for any
    process and any strides.

    The variances are right for the two extremes of data (Ho et al. 2020, Sec. 3.2):
    fixed_small, that of q(x_r | x_t, x0), sigma_r^2 (1 - q^2), for a point mass;
    fixed_large, that of q(x_t | x_r), sigma_t^2 (1 - q^2), for N(0, 1), alpha^2 + sigma^2 being 1.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        noise: draw k is for step k.
        variance: of a step.
        noisy_end: whether fixed_large draws in the step to t = 0 too. Algorithm 2 does not, and
            what is drawn there stays in the data; N(0, 1) is met only with it.

    Raises:
        ValueError: another variance.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance is one of {', '.join(get_args(Variance))}, got {variance}")
    check_grid(grid, denoiser.process)
    process, x = denoiser.process, x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        q = noise_ratio(process, t, r)
        x = transition_mean(process, x, x0, t, r, keep=q)
        if r > 0 or noisy_end:
            level = process.sigma((t if variance == "fixed_large" else r).double())
            x = x + level * (1 - q.square()).sqrt() * noise(index).to(x.dtype)
    return x


def sample_ddim_eta(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    eta: float = 1.0,
) -> Tensor:
    """DDIM with eta times DDPM's noise (Song et al. 2021, Eq. 12 and 16): 0 is `sample_ddim`, 1 is
    `sample_ddpm` with fixed_small.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        noise: draw k is for step k.
        eta: in [0, 1].

    Raises:
        ValueError: eta outside [0, 1].
    """
    check_grid(grid, denoiser.process)
    process, x = denoiser.process, x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        keep = ancestral_share(noise_ratio(process, t, r), eta)
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        x = transition(process, x, x0, t, r, keep, noise(index))
    return x
