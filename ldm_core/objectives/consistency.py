"""Consistency models: f(x_t, t) = f(x_s, s) for two states of one trajectory, s < t.

f leads from any state of the probability-flow ODE to its end, so f(x_0, 0) = x_0; any denoiser
that returns the data at t = 0 is a candidate (a `Denoiser` that predicts the velocity of a flow or
v, or a `Preconditioned` one). Here the two states are the same data with more and with less of the
same noise; as s -> t that has the gradient of consistency along the trajectory in expectation
(Song et al. 2023, Theorem 2). With a teacher, see `distillation.consistency`.

Losses are unweighted; the usual weight is 1 / (t - s) (Song & Dhariwal 2024, Sec. 3.5).
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.process import Process, add_noise
from ldm_core.objectives.regression import Distance, pseudo_huber


def consistency_training_loss(
    student: Network,
    averaged: Network,
    process: Process,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Condition,
    distance: Distance = pseudo_huber,
) -> Tensor:
    """d(f(x_t, t), sg f(x_s, s)), both states of the same x0 and eps (Song et al. 2023, Eq. 10).

    Args:
        student: f, trained: (x_t, t, cond) -> x0.
        averaged: f that sets the aim; best the student itself (Song & Dhariwal 2024, Sec. 3.2).
            Dropout should fall alike in both.
        process: gives alpha and sigma.
        x0: (B, ...) latents.
        eps: (B, ...) standard normal noise.
        t: (B,).
        s: (B,), below t, e.g. from `earlier_time`.
        cond: B conditions.
        distance: between two estimates of x0.

    Returns:
        (B,).
    """
    with torch.no_grad():
        aim = averaged(add_noise(process, x0, eps, s), s, cond)
    return distance(student(add_noise(process, x0, eps, t), t, cond), aim)


def earlier_time(
    process: Process, t: Tensor, stage: int, base: float = 2.0, k: float = 8.0, b: float = 1.0
) -> Tensor:
    """s < t that nears t stage by stage, from diffusion to consistency (Geng et al. 2024, ECT).

    In noise levels n = sigma / alpha: n_s = n_t (1 - (1 + k sigmoid(-b n_t)) / base^stage), not
    below 0. At stage 0 that is the data itself, and f is trained as a denoiser.

    Args:
        process: turns noise levels into times.
        t: (B,), before pure noise.
        stage: counted from 0.
        base: how much smaller the gap gets from one stage to the next.
        k, b: by how much, and up to which noise level, the gap is wider at little noise.
    """
    noise = process.sigma(t) / process.alpha(t)
    gap = (1 + k * (-b * noise).sigmoid()) / base**stage
    return process.time_of(-(noise * (1 - gap).clamp(min=0)).log())
