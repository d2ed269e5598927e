"""DPM-Solver++ on the reverse SDE, along one Brownian path: weak order 2.

With D held, the SDE of strength eta goes from t to r by (Lu et al. 2022b, for eta = 1)

    x_r = sigma_r / sigma_t q^eta x_t + alpha_r (1 - q^(1 + eta)) D + sigma_r sqrt(1 - q^(2 eta)) z

where q = exp(-h). Order 2 comes from a better D: extrapolated, or evaluated on the way.
"""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Brownian
from ldm_core.samplers.transition import ancestral_share, noise_ratio, time_halfway, transition


def sample_dpmpp_2m_sde(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    path: Brownian,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b; k-diffusion, `sample_dpmpp_2m_sde`, midpoint): D
    extrapolated to the middle of the step from the last two estimates. One evaluation per step;
    the first step and one to t = 0 are of order 1.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        path: the noise, e.g. a `BrownianPath`.
        eta: strength of the SDE, at least 0; 0 is DPM-Solver++(2M), 1 the reverse SDE. Between
            them it is not DDIM's eta, which draws eta^2 (1 - q^2) and not 1 - q^(2 eta).

    Raises:
        ValueError: eta below 0.
    """
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta is 0 (the ODE) or more, 1 being the reverse SDE, got {eta:g}")
    check_grid(grid, denoiser.process)
    process, x, last = denoiser.process, x_T, None
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        q = noise_ratio(process, t, r)
        h = -q.log()
        held = x0
        if last is not None and r > 0:
            h_last, x0_last = last
            held = x0 + h / (2 * h_last) * (x0 - x0_last)  # x0 itself after a step from pure noise
        x = transition(process, x, held, t, r, q**eta, path(t, r))
        last = h, x0
    return x


def sample_dpmpp_sde(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    path: Brownian,
    eta: float = 1.0,
) -> Tensor:
    """DPM-Solver++ (SDE) of k-diffusion (`sample_dpmpp_sde` with r = 1/2): D evaluated halfway in
    lambda, at a state that has come there by the same path. Two evaluations per step.

    Arguments and result as in `sample_dpmpp_2m_sde`, but eta is DDIM's, in [0, 1]. With draws
    instead of a path, independent over the half and the whole step, it is of order 1.

    Raises:
        ValueError: eta outside [0, 1], or a wrong grid.
    """
    check_grid(grid, denoiser.process)
    process, x = denoiser.process, x_T
    for index, (t, r) in enumerate(pairwise(grid)):
        keep = ancestral_share(noise_ratio(process, t, r), eta)
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        s = time_halfway(process, t, r)
        if s < t:  # there is a half: neither pure noise nor the data
            keep_s = ancestral_share(noise_ratio(process, t, s), eta)
            x_s = transition(process, x, x0, t, s, keep_s, path(t, s))
            x0 = denoiser.denoise(x_s, s, cond)
        x = transition(process, x, x0, t, r, keep, path(t, r))
    return x
