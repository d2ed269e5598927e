"""Flow-map distillation by the MeanFlow identity (Geng et al. 2025, Eq. 6).

Differentiating (t - r) u(x_t, t, r) = integral of v over [r, t] by t along the ODE gives
u = v - (t - r) du/dt with du/dt = v . grad_x u + d_t u. The student is regressed onto the right
side; v is the (guided) teacher's, so the target has no conditional-velocity variance.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.flow_map import AverageVelocity
from ldm_core.diffusion.process import over_dimensions
from ldm_core.objectives.regression import mean_square

TotalDerivative = Callable[[AverageVelocity, Tensor, Tensor, Tensor, Tensor, Condition], Tensor]
"""(student, x_t, t, r, v, cond) -> du/dt along dx/dt = v, (B, ...), without gradients."""


@torch.no_grad()
def exact_derivative(
    student: AverageVelocity, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor, cond: Condition
) -> Tensor:
    """v . grad_x u + d_t u by forward-mode differentiation.

    The fused attention kernels have no forward mode, so attention is computed plainly.
    """

    def at(x: Tensor, time: Tensor) -> Tensor:
        return student(x, time, r, cond)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(at, (x_t, t), (v, torch.ones_like(t)))[1]


@torch.no_grad()
def central_derivative(
    student: AverageVelocity,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    cond: Condition,
    step: float = 5e-3,
    end: float = 1.0,
) -> Tensor:
    """The same by a difference of two evaluations on the line x_t + h v, t + h.

    The offsets are cut where they would leave [r, end], which the student never saw; the error is
    O(step^2) away from those ends. Any attention kernel will do, also compiled.
    """
    ahead, behind = (end - t).clamp(max=step), (t - r).clamp(max=step)  # (B,)
    after = student(x_t + over_dimensions(ahead, x_t) * v, t + ahead, r, cond)
    before = student(x_t - over_dimensions(behind, x_t) * v, t - behind, r, cond)
    width = (ahead + behind).clamp(min=torch.finfo(t.dtype).tiny)  # 0 only at r = t = end
    return (after - before) / over_dimensions(width, x_t)


@torch.no_grad()
def flow_map_target(
    student: AverageVelocity,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    v: Tensor,
    cond: Condition,
    derivative: TotalDerivative = exact_derivative,
) -> Tensor:
    """sg[v - (t - r) (v . grad_x u + d_t u)], (B, ...); at r = t it is v."""
    total = derivative(student, x_t, t, r, v, cond)
    return v - over_dimensions(t - r, x_t) * total


def flow_map_loss(
    student: AverageVelocity,
    teacher_velocity: Network,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    cond: Condition,
    derivative: TotalDerivative = exact_derivative,
    weight_power: float = 0.0,
    weight_offset: float = 1e-3,
) -> Tensor:
    """||u(x_t, t, r) - target||^2, adaptively weighted (Geng et al. 2025, Sec. 4.3).

    Args:
        student: the average velocity being trained.
        teacher_velocity: v(x_t, t, cond), guided as the student shall be.
        x_t: (B, ...) noisy latents.
        t: (B,).
        r: (B,), at most t; r = t for part of a batch keeps u(x_t, t, t) = v.
        cond: B conditions.
        derivative: `exact_derivative`, or `central_derivative` (or a `partial` of it).
        weight_power: p in the weight sg[(e + c)^-p]; 0 is the plain squared error.
        weight_offset: c there.

    Returns:
        (B,).
    """
    with torch.no_grad():
        v = teacher_velocity(x_t, t, cond)
    target = flow_map_target(student, x_t, t, r, v, cond, derivative)
    error = mean_square(student(x_t, t, r, cond), target)
    return error * (error.detach() + weight_offset) ** -weight_power
