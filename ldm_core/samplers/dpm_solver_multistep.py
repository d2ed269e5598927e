"""DPM-Solver++ with memory: orders 2 and 3 for one evaluation per step.

The data estimates of the last steps lie on a polynomial in lambda, which is integrated over the
next one. The third-order solver in diffusers and k-diffusion takes the divided difference
D[0, 1, 2] = D'' / 2 for D'' and so stays at order 2; here the polynomial is integrated as it is.

The third order is that of grids which start below pure noise: from there, where lambda is infinite,
the first step is DDIM's, whose error is of order 2 in the end.
"""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.dpm_solver_singlestep import midpoint_step
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.exponential import Node, StepFunction, bh2, data_step, level, order_at


def sample_dpmpp_2m(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    step_function: StepFunction | None = bh2,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, Algorithm 2); the first step is DDIM's.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        step_function: `bh2` weighs the slope as the paper does ("midpoint" in diffusers); None
            integrates it exactly ("heun").
    """
    check_grid(grid, denoiser.process)
    process, x, known = denoiser.process, x_T, list[Node]()
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        known = [(level(process, t), x0), *known][:2]
        x = data_step(process, x, t, r, known, step_function)
    return x


def sample_dpmpp_3m(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    seeded: bool = True,
) -> Tensor:
    """DPM-Solver++(3M): the parabola through three data estimates (after Lu et al. 2022b).

    Its order tells from a few dozen evaluations on; below, lines and UniPC-2 often err less
    (`make bench-samplers`).

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        seeded: whether the first step is DPM-Solver++(2S)'s, for one evaluation more. A DDIM step
            there costs an error of h^2 once, which is of order 2 in the end; from pure noise it
            has to be that, and no evaluation is added.
    """
    check_grid(grid, denoiser.process)
    process, x, known = denoiser.process, x_T, list[Node]()
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        known = [(level(process, t), x0), *known][: order_at(index, 3, grid)]
        if seeded and index == 0:
            x = midpoint_step(denoiser, x, x0, t, r, cond)
        else:
            x = data_step(process, x, t, r, known)
    return x
