"""UniPC: a multistep predictor, corrected with the evaluation that the next step needs anyway."""

from itertools import pairwise

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.grids import check_grid
from ldm_core.samplers.events import OnStep, StepEvent
from ldm_core.samplers.exponential import Node, StepFunction, bh2, data_step, level, order_at


def sample_unipc(
    denoiser: DenoiserLike,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    on_step: OnStep | None = None,
    order: int = 2,
    corrector: bool = True,
    step_function: StepFunction = bh2,
) -> Tensor:
    """UniPC-p for data prediction (Zhao et al. 2023, Algorithms 1 and 2): order p + 1 for one
    evaluation per step, order p without the corrector.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        order: p, how many estimates the predictor's polynomial goes through; the corrector's goes
            through the one at its end too. The first steps have only as many as there are.
        corrector: whether to correct.
        step_function: B(h), which weighs straight lines: the predictor's for p = 2, the
            corrector's for p = 1.

    Raises:
        ValueError: order below 1.
    """
    if order < 1:
        raise ValueError(f"UniPC is of order 1 and above (2 or 3 as a rule), got {order}")
    check_grid(grid, denoiser.process)
    process, x, known = denoiser.process, x_T, list[Node]()
    x_s, s = x_T, grid[0]
    for index, (t, r) in enumerate(pairwise(grid)):
        x0 = denoiser.denoise(x, t, cond)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        here = (level(process, t), x0)
        if corrector and known:  # the step to t once more, from where it started
            x = data_step(process, x_s, s, t, [known[0], here, *known[1:]], step_function)
        known = [here, *known][: order_at(index, order, grid)]
        x_s, s = x, t
        x = data_step(process, x, t, r, known, step_function)
    return x
