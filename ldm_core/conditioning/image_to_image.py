"""Image to image: start from a noised picture (SDEdit, Meng et al. 2022, Alg. 1)."""

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.process import add_noise
from ldm_core.samplers import Sampler


def sample_image_to_image(
    sampler: Sampler,
    denoiser: DenoiserLike,
    eps: Tensor,
    grid: Tensor,
    cond: Condition,
    x0: Tensor,
    strength: float,
) -> Tensor:
    """Noise `x0` to the time where `strength` of the steps are left, then take those.

    Args:
        sampler: any.
        denoiser: as for the sampler.
        eps: (B, ...) standard normal noise.
        grid: (steps + 1,) decreasing times, before the cut.
        cond: B conditions.
        x0: (B, ...) what to start from.
        strength: in [0, 1]. 0 gives `x0` back; 1 is sampling from `eps` alone, even where the
            process keeps a trace of the data at its end.

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
    if left == steps:
        return sampler(denoiser, denoiser.process.prior_std * eps, grid, cond)
    grid = grid[steps - left :]
    return sampler(denoiser, add_noise(denoiser.process, x0, eps, grid[0]), grid, cond)
