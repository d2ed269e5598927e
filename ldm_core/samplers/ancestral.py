"""Ancestral samplers: down the ODE to less noise than the next time has, then noise up to it.

In y = x / alpha over rho = sigma / alpha, k-diffusion's coordinates, a step goes to rho_down and
adds rho_up z, where rho_down^2 + rho_up^2 = rho_r^2 and rho_up is eta times DDPM's. That is a
`transition` that keeps rho_down / rho_r of the noise.
"""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.ddpm import sample_ddim_eta
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.exponential import ddim_step
from ldm_core.samplers.noise import Noise
from ldm_core.samplers.transition import ancestral_share, noise_ratio, time_halfway, transition


def sample_euler_ancestral(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    eta: float = 1.0,
) -> Tensor:
    """Euler's method by rho down to rho_down, then noise (k-diffusion, `sample_euler_ancestral`).

    Euler's method by rho holds x0 over a step, so this is DDIM with eta under the name it has
    elsewhere. At eta = 0 it is `sample_euler` where time is straight: on a flow and on VE.

    Arguments, result and errors as in `sample_ddim_eta`.
    """
    return sample_ddim_eta(denoiser, x_T, grid, cond, on_step, noise=noise, eta=eta)


def sample_dpmpp_2s_ancestral(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    eta: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022b, Algorithm 1 with r_1 = 1/2) down to rho_down, then noise
    (k-diffusion, `sample_dpmpp_2s_ancestral`): weak order 2, two evaluations per step.

    Arguments, result and errors as in `sample_ddim_eta`; steps from pure noise and to the data are
    of one evaluation and of order 1, there being no half of them in lambda.
    """
    check_grid(grid, denoiser.process)
    process, x = denoiser.process, x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        keep = ancestral_share(noise_ratio(process, t, r), eta)
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        s = time_halfway(process, t, r, keep)
        if s < t:
            x0 = denoiser.denoise(ddim_step(process, x, x0, t, s), s, cond)
        x = transition(process, x, x0, t, r, keep, noise(index))
    return x
