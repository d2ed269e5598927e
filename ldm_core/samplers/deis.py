"""DEIS: Adams-Bashforth on the noise estimate, one evaluation per step."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.samplers.dpm_solver_singlestep import midpoint_step
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.exponential import Node, bend, ddim_step, level, order_at


def sample_deis(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    order: int = 3,
    seeded: bool = False,
) -> Tensor:
    """The polynomial through the last estimates of eps, integrated exactly (Zhang & Chen
    2023), as one in lambda ("log rho" in diffusers) where the paper has one in t.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        order: how many estimates the polynomial goes through, as soon as there are so many;
            1 is DDIM.
        seeded: whether the first step is DPM-Solver++(2S)'s, for one evaluation more, without
            which no order is above 2 in the end. From pure noise, where lambda is infinite, it is
            DDIM's all the same, so order 3 needs a grid that starts below.

    Raises:
        ValueError: order below 1.
    """
    if order < 1:
        raise ValueError(f"DEIS is of order 1 and above (2 or 3 as a rule), got {order}")
    check_grid(grid, denoiser.process)
    process, x, known = denoiser.process, x_T, list[Node]()
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        eps = convert(x0, x, t, process, Prediction.X0, Prediction.EPS)
        known = [(-level(process, t), eps), *known][: order_at(index, order, grid)]
        if seeded and index == 0:
            x = midpoint_step(denoiser, x, x0, t, r, cond)
        else:
            at, values = zip(*known, strict=True)  # mirrored: eps for x0, -lambda for lambda
            curve = process.sigma(r) * bend(at, values, -level(process, r))
            x = ddim_step(process, x, x0, t, r) + curve
    return x
