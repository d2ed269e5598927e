"""Exact moments of what a sampler returns for Gaussian data, without drawing anything.

The denoiser of N(m, S^2) is affine in x_t, so a sampler is affine in its start and its draws. Run
on a batch of one row of zeros, one of a unit start and one of each unit draw, it shows every
coefficient, and the moments of its result follow.
"""

import torch
from analytic import MEAN, STD
from exact_gaussian import Gaussian

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import (
    VPSDE,
    DiscreteVP,
    TrigFlow,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)

PROCESSES = {
    "flow": FlowProcess(),
    "trig": TrigFlow(),
    "vp sde": VPSDE(),
    "ve": VarianceExploding(),
    "linear": DiscreteVP(linear_betas()),
    "zero terminal": DiscreteVP(zero_terminal_snr(scaled_linear_betas())),
}


def gaussian(process, mean=MEAN, std=STD) -> Denoiser:
    """The denoiser of N(mean, std^2)."""
    return Gaussian(process, mean, std).denoiser()


def marginal(process, t, mean=MEAN, std=STD):
    """Mean and standard deviation of x_t, of data N(mean, std^2)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return float(alpha * mean), float((alpha**2 * std**2 + sigma**2).sqrt())


def probe(sample, denoiser, grid, start, draws=None):
    """Mean and standard deviation of what `sample` makes of x_T ~ N(*start), with `noise`."""
    draws = len(grid) - 1 if draws is None else draws
    x_T = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x_T[1] = 1

    def noise(k):
        z = torch.zeros_like(x_T)
        z[2 + k] = 1
        return z

    return _moments(sample(denoiser, x_T, grid, None, noise=noise), start)


def probe_path(sample, denoiser, grid, start):
    """As `probe`, with `path`: the unit draws are increments between the times it is asked for."""
    knots = asked(sample, denoiser, grid)
    return _moments(along(sample, denoiser, grid, knots), start)


def strong_difference(sample, denoiser, grids, start):
    """Root mean square of what two grids make of the same x_T ~ N(*start) and the same path."""
    knots = torch.cat([asked(sample, denoiser, grid) for grid in grids]).unique()
    one, other = (along(sample, denoiser, grid, knots) for grid in grids)
    mean, std = _moments(one - other, start)
    return (mean**2 + std**2) ** 0.5


def asked(sample, denoiser, grid):
    """The times at which a sampler needs the path, rising."""
    times = set()

    def listen(t, r):
        times.update((float(t), float(r)))
        return torch.zeros(1, 1, dtype=torch.float64)

    sample(denoiser, torch.zeros(1, 1, dtype=torch.float64), grid, None, path=listen)
    return torch.tensor(sorted(times), dtype=torch.float64)


def along(sample, denoiser, grid, knots):
    """What is made of zeros, of a unit start and of a unit draw between each two of `knots`."""
    x_T = torch.zeros(1 + len(knots), 1, dtype=torch.float64)
    x_T[1] = 1

    def path(t, r):
        inside = (knots[:-1] >= float(r)) & (knots[1:] <= float(t))
        z = torch.zeros_like(x_T)
        z[2:, 0] = (inside * knots.diff()).sqrt() / (t - r).sqrt()
        return z

    return sample(denoiser, x_T, grid, None, path=path)


def _moments(result, start):
    response = (result - result[0])[:, 0]
    mean, std = start
    variance = (response[1] * std) ** 2 + response[2:].square().sum()
    return float(result[0, 0] + response[1] * mean), float(variance.sqrt())
