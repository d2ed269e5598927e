"""Denoising score matching: regress what was mixed into x_t, in any prediction (Vincent 2011).

All predictions are affine in x0 at a given x_t, so one minimiser serves them all and an error in
one is a multiple of the error in x0: with the prediction's row (p0, p1) of coefficients in
(x0, eps) and eps = (x_t - alpha x0) / sigma, the multiple is p0 - p1 alpha / sigma.
"""

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import Process, add_noise, half_log_snr
from ldm_core.objectives.regression import mean_square
from ldm_core.objectives.weightings import Weighting


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
        t: (B,) times in [0, end] at which the prediction's target is finite.
        cond: B conditions.
        weighting: of the error in x0, see `weightings`; by default the network's own error counts
            alike at all times.

    Returns:
        (B,) mean over a sample's dimensions, in float32 or wider.
    """
    x_t = add_noise(process, x0, eps, t)
    loss = mean_square(network(x_t, t, cond), prediction.target(x0, eps, t, process))
    if weighting is None:
        return loss
    level = half_log_snr(process, t)
    return weighting(level) / error_ratio(prediction, process, t).square() * loss


def error_ratio(prediction: Prediction, process: Process, t: Tensor) -> Tensor:
    """(error in `prediction`) / (error in x0) at the same x_t, of the shape of `t`."""
    of_data, of_noise = prediction.row(t, process)
    return of_data - of_noise * process.alpha(t) / process.sigma(t)
