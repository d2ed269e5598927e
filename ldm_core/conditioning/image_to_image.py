"""Image to image: start from a noised picture (SDEdit, Meng et al. 2022, Alg. 1)."""

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.process import Process, add_noise
from ldm_core.samplers import Sampler
from ldm_core.samplers.events import OnStep, watched


def sample_image_to_image(
    sampler: Sampler,
    denoiser: DenoiserLike,
    eps: Tensor,
    grid: Tensor,
    cond: Condition,
    x0: Tensor,
    strength: float,
    on_step: OnStep | None = None,
) -> Tensor:
    """Noise `x0` to the time where `strength` of the steps are left, then take those.

    Args:
        sampler: any.
        denoiser: as for the sampler.
        eps: (B, ...) standard normal noise.
        grid: (steps + 1,) decreasing times, before the cut.
        cond: B conditions.
        x0: (B, ...) what to start from.
        strength: in [0, 1]. 0 gives `x0` back; 1 of a grid from the process's end is sampling from
            `eps` alone, even where the process keeps a trace of the data there.
        on_step: called by the sampler, with steps counted from the first that is taken.

    Returns:
        (B, ...).

    Raises:
        ValueError: a strength outside [0, 1], shapes that differ, or a grid that is none.
    """
    check_grid(grid, denoiser.process)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength lies in [0, 1], got {strength:g}")
    if x0.shape != eps.shape:
        raise ValueError(f"latent {tuple(x0.shape)} and noise {tuple(eps.shape)} differ in shape")
    steps = len(grid) - 1
    left = round(strength * steps)
    if left == 0:
        return x0
    grid = grid[steps - left :]
    return watched(sampler, on_step)(denoiser, _start(denoiser.process, x0, eps, grid), grid, cond)


def _start(process: Process, x0: Tensor, eps: Tensor, grid: Tensor) -> Tensor:
    """The state at grid[0]: pure noise at the process's end, the noised picture before it."""
    if grid[0] >= process.end * (1 - 1e-6):  # within the rounding of `check_grid`
        return process.prior_std * eps
    return add_noise(process, x0, eps, grid[0])
