"""ER-SDE solvers: how much noise to draw at each level is a function phi (Cui et al. 2023).

With y = x / alpha and rho = sigma / alpha, for phi with phi(s) / s not falling in s,

    y_r = phi_r / phi_t y_t + phi_r int_[rho_r, rho_t] phi'(s) / phi(s)^2 D(s) ds
        + sqrt(rho_r^2 - (rho_t phi_r / phi_t)^2) z

is exact along the path of D. phi(s) = s is the ODE, phi(s) = s^2 the reverse SDE. Stages 1, 2, 3
hold D, or continue it by one or two derivatives taken from past steps; by parts, these add

    phi_r int phi' / phi^2 (s - rho_t)^k / k! ds = (rho_r - rho_t)^k / k!
        + phi_r int (s - rho_t)^(k - 1) / (k - 1)! / phi ds

times the k-th derivative. phi is given as phi(s) / s, which has a limit at pure noise.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.noise import Noise
from ldm_core.samplers.transition import noise_to_signal, transition

Scaler = Callable[[Tensor], Tensor]
"""s -> phi(s) / s, elementwise on [0, inf]; not falling."""

_NODES = 24  # exact to rounding for the smooth functions and the steps of any usable grid


def er_sde_5(s: Tensor) -> Tensor:
    """phi(s) / s = exp(s^0.3) + 10, the fifth of the paper's and the one its code samples with."""
    return (s**0.3).exp() + 10


def sample_er_sde(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    *,
    noise: Noise,
    stages: int = 3,
    scaler: Scaler = er_sde_5,
) -> Tensor:
    """ER-SDE-Solver-1, 2 or 3 (Cui et al. 2023) on any process, one evaluation per step: weak order
    1, 2 and 2, noise being treated as in the first. A step to t = 0 ends at D.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        noise: draw k is for step k.
        stages: 1, 2 or 3; the first steps have fewer.
        scaler: phi(s) / s.

    Raises:
        ValueError: another number of stages, or phi(s) / s falling.
    """
    check_grid(grid, denoiser.process)
    process, x, past = denoiser.process, x_T, list[Tensor]()
    rho = noise_to_signal(process, grid)
    scale = scaler(rho)
    _check(stages, rho, scale)
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        keep = scale[index + 1] / scale[index]
        x = transition(process, x, x0, t, r, keep, noise(index))
        past = _derivatives(x0, past, rho[: index + 1])[:stages]
        if r > 0:
            for k in range(1, len(past)):
                weight = _weight(k, rho[index], rho[index + 1], scaler)
                x = x + process.alpha(r.double()) * weight * past[k]
    return x


def _derivatives(x0: Tensor, past: list[Tensor], rho: Tensor) -> list[Tensor]:
    """D and its derivatives by rho at the last of `rho`, from those one step before.

    A k-th divided difference is k! times smaller than the derivative it stands for. As in the
    paper, the first is the slope over the last step, not corrected by the second to be that here.
    """
    found = [x0]
    for k, before in enumerate(past[:2], start=1):
        found.append((found[-1] - before) * k / (rho[-1] - rho[-1 - k]))
    return found


def _weight(k: int, rho_t: Tensor, rho_r: Tensor, scaler: Scaler) -> Tensor:
    """The module's integral, k = 1 or 2, by Gauss & Legendre in ln s, in which phi is smooth."""
    nodes, weights = (
        torch.from_numpy(a).to(rho_t) for a in np.polynomial.legendre.leggauss(_NODES)
    )
    half = (rho_t / rho_r).log() / 2
    s = rho_r * (half * (nodes + 1)).exp()
    integral = half * (weights * (s - rho_t) ** (k - 1) / scaler(s)).sum()  # ds = s d(ln s)
    return (rho_r - rho_t) ** k / k + rho_r * scaler(rho_r) * integral


def _check(stages: int, rho: Tensor, scale: Tensor) -> None:
    if stages not in (1, 2, 3):
        raise ValueError(f"ER-SDE has 1, 2 or 3 stages, got {stages}")
    falls = (~(scale.diff() <= 0)).nonzero()
    if len(falls):
        i = int(falls[0])
        raise ValueError(
            f"phi(s) / s is not to fall with s, but from s = {rho[i + 1]:g} to {rho[i]:g} it goes "
            f"from {scale[i + 1]:g} to {scale[i]:g}"
        )
