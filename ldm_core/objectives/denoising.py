"""Denoising score matching: regress what was mixed into x_t, in any prediction (Vincent 2011).

All predictions are affine in x0 at a given x_t, so one minimiser serves them all and an error in
one is a multiple of the error in x0: with the prediction's row (p0, p1) of coefficients in
(x0, eps) and eps = (x_t - alpha x0) / sigma, the multiple is p0 - p1 alpha / sigma.
"""

import torch
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import Process, add_noise, half_log_snr
from ldm_core.objectives.regression import mean_square
from ldm_core.objectives.weightings import Weighting

_INFINITE = 16.0  # lambda that stands for infinity: limits are reached to exp(-16)


def denoising_loss(
    network: Network,
    process: Process,
    prediction: Prediction,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    weighting: Weighting | None = None,
) -> Tensor:
    """||network(x_t, t, cond) - (p0 x0 + p1 eps)||^2 at x_t = alpha_t x0 + sigma_t eps, weighted.

    Args:
        network: predicts `prediction`.
        process: gives alpha_t and sigma_t.
        prediction: what the network's output means.
        x0: (B, ...) latents.
        eps: (B, ...) standard normal noise.
        t: (B,) times in [0, end] at which the prediction's target is finite; with a weighting, its
            limit at pure data or pure noise counts there.
        cond: B conditions.
        weighting: of the error in x0, see `weightings`; by default the network's own error counts
            alike at all times.

    Returns:
        (B,) mean over a sample's dimensions, in float32 or wider.

    Raises:
        ValueError: at pure data or pure noise the weighting grows without end.
    """
    x_t = add_noise(process, x0, eps, t)
    loss = mean_square(network(x_t, t, cond), prediction.target(x0, eps, t, process))
    if weighting is None:
        return loss
    return _weight(prediction, process, t, weighting).to(loss.dtype) * loss


def error_ratio(prediction: Prediction, process: Process, t: Tensor) -> Tensor:
    """(error in `prediction`) / (error in x0) at the same x_t, of the shape of `t`."""
    of_data, of_noise = prediction.row(t, process)
    noise = of_noise * process.alpha(t) / process.sigma(t)
    return of_data - torch.where(of_noise == 0, 0.0, noise)  # x0 itself at pure data: no 0 inf


def _weight(prediction: Prediction, process: Process, t: Tensor, weighting: Weighting) -> Tensor:
    """The weight of the prediction's own squared error, float64; of the shape of `t`."""
    t = t.double()
    level = half_log_snr(process, t)
    near = torch.where(level.isinf(), level.clamp(-_INFINITE, _INFINITE), level)
    inside = torch.where(level.isinf(), process.time_of(near), t)
    weight = weighting(near) / error_ratio(prediction, process, inside).square()
    grows = level.isinf() & (weight > 1e6)
    if bool(grows.any()):
        name = getattr(weighting, "__name__", "this weighting")
        raise ValueError(
            f"at t = {float(t[grows][0]):g} {name} weighs errors in {prediction.value} infinitely: "
            "draw no such times, or choose a weighting or prediction that is finite there"
        )
    return weight
