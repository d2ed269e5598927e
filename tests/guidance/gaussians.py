"""Gaussian data on every process, and where exact ODEs take them."""

from itertools import pairwise

import torch
from analytic import caption
from scipy.integrate import solve_ivp

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, batch_time, over_dimensions
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas

TABLE = DiscreteVP(linear_betas(0.01, 0.7, steps=8))
PROCESSES = [FlowProcess(), TrigFlow(), VPSDE(), TABLE, VarianceExploding()]
each_process = {"argvalues": PROCESSES, "ids": [type(process).__name__ for process in PROCESSES]}


def levels(process, t, cond, x):
    """m, S^2, alpha, sigma and V_t = alpha^2 S^2 + sigma^2, to multiply x with."""
    t = over_dimensions(t, x)
    m, s = cond.pooled.unbind(-1)
    m, s = over_dimensions(m, x), over_dimensions(s, x)
    alpha, sigma = process.alpha(t), process.sigma(t)
    return m, s**2, alpha, sigma, alpha**2 * s**2 + sigma**2


def gaussian(process, prediction=Prediction.VELOCITY, passes=None):
    """The denoiser of N(m, S^2); the sizes of the batches it is asked are appended to `passes`."""

    def network(x_t, t, cond):
        if passes is not None:
            passes.append(len(x_t))
        m, s2, alpha, sigma, v = levels(process, t, cond, x_t)
        x0 = m + alpha * s2 / v * (x_t - alpha * m)
        eps = sigma / v * (x_t - alpha * m)
        of_data, of_noise = prediction.row(over_dimensions(t, x_t), process)
        return of_data * x0 + of_noise * eps

    return Denoiser(network, process, prediction)


def some_times(process, count):
    """Times with lambda from -1.5 to 1.5."""
    return process.time_of(torch.linspace(-1.5, 1.5, count, dtype=torch.float64))


def some_states(process, t, shape=(3, 4, 4), seed=0):
    """x_t of the order of what the process makes of data, one for every time."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(len(t), *shape, dtype=torch.float64, generator=draw)
    return x * (process.alpha(t) + process.sigma(t)).reshape(-1, *[1] * len(shape))


def moments(denoiser, cond, *times, start=1.0):
    """Mean and std of what the ODE makes of N(0, start^2) between the first and the last time.

    It is affine, so two states tell. Times between are where the velocity may jump; each piece
    stops short of them.
    """

    def slope(t, x):
        x = torch.from_numpy(x)[:, None]
        t = torch.tensor(t, dtype=torch.float64)
        return denoiser.velocity(x, t, cond.expand(2))[:, 0].numpy()

    x = torch.tensor([0.0, start], dtype=torch.float64).numpy()
    for t, r in pairwise(times):
        piece = (t - 1e-12, r + 1e-12)
        x = solve_ivp(slope, piece, x, method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    return x[0], x[1] - x[0]


def spread(process, s, t):
    """sqrt(V_t) of N(m, S^2)."""
    t = torch.tensor(t, dtype=torch.float64)
    return float((process.alpha(t) ** 2 * s**2 + process.sigma(t) ** 2).sqrt())


def growth(process, s, t, r):
    """What the ODE of N(0, S^2) multiplies x_t by on the way to r."""
    return spread(process, s, r) / spread(process, s, t)


def velocity_of(x0, x_t, t, process):
    return convert(x0, x_t, batch_time(t, x_t), process, Prediction.X0, Prediction.VELOCITY)


def captions(means, std=0.4):
    """A batch of captions of different means."""
    return type(caption(0.0)).cat([caption(mean, std) for mean in means])
