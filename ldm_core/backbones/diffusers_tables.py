"""What the scheduler beside a diffusers model says of its process and prediction."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.variance_preserving import (
    DiscreteVP,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from ldm_core.errors import UserError


def table_of(scheduler: Mapping[str, Any], default: Tensor) -> DiscreteVP:
    """The process of a scheduler's table of betas; `default` where it names none.

    Raises:
        UserError: a schedule that is not known here.
    """
    first, last = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    steps = scheduler.get("num_train_timesteps", 1000)
    match scheduler.get("beta_schedule"):
        case None:
            betas = default
        case "linear":
            betas = linear_betas(first, last, steps)
        case "scaled_linear":
            betas = scaled_linear_betas(first, last, steps)
        case "squaredcos_cap_v2":
            betas = cosine_betas(steps)
        case other:
            raise UserError(f"beta_schedule {other!r} is none of linear, scaled_linear, squaredcos")
    if scheduler.get("trained_betas") is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    return DiscreteVP(
        zero_terminal_snr(betas) if scheduler.get("rescale_betas_zero_snr") else betas
    )


def prediction_of(scheduler: Mapping[str, Any]) -> Prediction:
    """What a scheduler takes its model to predict; the noise where it does not say.

    Raises:
        UserError: a prediction that is not known here.
    """
    match scheduler.get("prediction_type", "epsilon"):
        case "epsilon":
            return Prediction.EPS
        case "v_prediction":
            return Prediction.V
        case "sample":
            return Prediction.X0
        case other:
            raise UserError(f"prediction_type {other!r} is none of epsilon, v_prediction, sample")
