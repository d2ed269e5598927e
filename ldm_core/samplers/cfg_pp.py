"""CFG++ (Chung et al. 2024, Algorithm 2): DDIM that guides the data and not the noise.

    x0 = D_u + w (D_c - D_u)
    x_r = alpha_r x0 + sigma_r eps_u,   eps_u = (x_t - alpha_t D_u) / sigma_t

A step is DDIM's under classifier-free guidance of scale w / (1 - exp(lambda_t - lambda_r)), with
lambda = ln(alpha / sigma): w itself in the last step to the data, and more the shorter the step.
So w in [0, 1] does what larger scales do there, and the same w guides more the more steps there
are. The noise is one estimate's and the data two's, which no denoiser can say: hence a sampler.
"""

from itertools import pairwise

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition
from ldm_core.diffusion.grids import check_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import over_dimensions
from ldm_core.guidance.guided import Pair
from ldm_core.samplers.events import OnStep, StepEvent


def sample_cfg_pp(
    pair: Pair,
    x_T: Tensor,
    grid: Tensor,
    cond: Condition,
    scale: float | Tensor,
    on_step: OnStep | None = None,
) -> Tensor:
    """Guided data, renoised with the unconditional noise.

    Arguments, result and errors as in `sample_ddim`, and

    Args:
        pair: gives D_c and D_u in one call, as `NullPair` does from one batch.
        scale: w, one number or (B,); the paper's lambda, in [0, 1].

    Raises:
        ValueError: a scale outside [0, 1].
    """
    _check_scale(scale)
    process, x = pair.good.process, x_T
    check_grid(grid, process)
    if isinstance(scale, Tensor):
        scale = over_dimensions(scale.to(x_T), x_T)
    for index, (t, r) in enumerate(pairwise(grid)):
        conditional, unconditional = pair.both(x, t, cond, Prediction.X0)
        x0 = unconditional + scale * (conditional - unconditional)
        if on_step is not None:
            on_step(StepEvent(index, t, x, x0))
        eps = convert(unconditional, x, t, process, Prediction.X0, Prediction.EPS)
        x = process.alpha(r) * x0 + process.sigma(r) * eps
    return x


def _check_scale(scale: float | Tensor) -> None:
    scales = torch.as_tensor(scale)
    outside = ~((scales >= 0) & (scales <= 1))
    if bool(outside.any()):
        raise ValueError(
            f"the scale of CFG++ lies in [0, 1], got {float(scales[outside][0]):g}: 0.6 does about "
            "what 7.5 does in ClassifierFreeGuidance, which takes larger ones"
        )
