"""The best few times to sample at, found by descent on the sampler's own error.

A fine run of the model is taken for the truth. Of the ways through a grid of candidates in N
steps, one is moved time by time, each to the candidate between its neighbours where the sampler
ends nearest to the fine run from the same noise, until no move helps. What is measured is what is
wanted: errors of single steps, which dynamic programming adds up (Watson et al. 2021; Chen et al.
2024), neither know how they grow on the way nor that they cancel, nor what a solver remembers.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers import Sampler
from ldm_core.samplers.dpm_solver_singlestep import sample_dpmpp_2s


@torch.no_grad()
def optimised_grid(
    denoiser: DenoiserLike,
    x_T: Tensor,
    candidates: Tensor,
    steps: int,
    cond: Condition,
    sample: Sampler,
) -> Tensor:
    """The `steps` steps through `candidates` that bring `sample` nearest to a fine run.

    Args:
        denoiser: the model that will be sampled, guidance included.
        x_T: (B, ...) states at candidates[0] to measure at; dozens, or the grid fits these only.
        candidates: (K + 1,) decreasing times; the first and the last are kept.
        steps: N, at most K.
        cond: B conditions.
        sample: the sampler that the grid is for.

    Returns:
        (steps + 1,) decreasing times, on `x_T` no worse than every (K / N)th candidate, which is
        where the descent starts. A round of moves samples about 2 K times.

    Raises:
        ValueError: candidates that are no grid, or fewer than steps.
    """
    check_grid(candidates, denoiser.process)
    if not 1 <= steps < len(candidates):
        raise ValueError(f"{steps} steps through {len(candidates)} candidates: give more of these")
    truth = sample_dpmpp_2s(denoiser, x_T, refined(candidates, 4), cond)

    def error(path: list[int]) -> float:
        x = sample(denoiser, x_T, candidates[path], cond)
        return float((x - truth).square().mean())

    path = torch.linspace(0, len(candidates) - 1, steps + 1).round().long().tolist()
    least, before = error(path), float("inf")
    while least < before:
        before = least
        for n in range(1, steps):
            for k in range(path[n - 1] + 1, path[n + 1]):
                moved = [*path[:n], k, *path[n + 1 :]]
                if (here := error(moved)) < least:
                    path, least = moved, here
    return candidates[path]


def refined(grid: Tensor, times: int) -> Tensor:
    """Every step of a grid in `times` equal ones: (N + 1,) -> (times N + 1,)."""
    shares = torch.arange(times, dtype=torch.float64, device=grid.device) / times
    parts = [t + (r - t) * shares for t, r in pairwise(grid.double())]
    return torch.cat([*(part.to(grid) for part in parts), grid[-1:]])
