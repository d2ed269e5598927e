"""A network whose inputs and targets have unit variance at every noise level, as a denoiser.

Karras et al. 2022, Sec. 5, for any process: their state is x_t / alpha_t, their noise level
sigma_t / alpha_t. With V_t = alpha^2 sigma_data^2 + sigma^2, the variance of x_t,

    D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)
    c_in = 1 / sqrt(V_t)                        the network's input has variance 1
    c_skip = alpha sigma_data^2 / V_t           so that c_out is the smallest, and
    c_out = sigma sigma_data / sqrt(V_t)        the network's target has variance 1
    c_noise = ln(sigma / alpha) / 4             the noise level as the network is told it

At t = 0, c_skip = 1 and c_out = 0: D is the data there, as consistency models need. On the circle
with sigma_data = 1 the network predicts -v.
"""

from typing import NamedTuple

from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, Network
from ldm_core.diffusion.process import Process, half_log_snr, over_dimensions


class Coefficients(NamedTuple):
    """Each of the shape of the time they are for."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def edm_coefficients(process: Process, t: Tensor, sigma_data: float) -> Coefficients:
    """c_skip, c_out, c_in and c_noise (Karras et al. 2022, Table 1)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = (alpha * sigma_data).square() + sigma.square()
    return Coefficients(
        skip=alpha * sigma_data**2 / variance,
        out=sigma * sigma_data / variance.sqrt(),
        into=variance.rsqrt(),
        noise=(-half_log_snr(process, t) / 4).clamp(-5, 5),  # finite at pure data and pure noise
    )


class Preconditioned:
    """A raw network F as a network that predicts x0: `Denoiser(Preconditioned(...), process, X0)`.

    Attributes:
        network: F, which sees c_in x_t and c_noise in place of x_t and t.
        process: the one it is trained on.
        sigma_data: standard deviation of the data, which has mean 0.
    """

    def __init__(self, network: Network, process: Process, sigma_data: float = 1.0) -> None:
        """`sigma_data`: 1 for latents that were normalised.

        Raises:
            ValueError: sigma_data is not positive.
        """
        if sigma_data <= 0:
            raise ValueError(f"sigma_data is a standard deviation, above 0, got {sigma_data:g}")
        self.network, self.process, self.sigma_data = network, process, sigma_data

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """D(x_t, t): (B, ...) -> (B, ...) for t (B,); trained with the weighting `edm`."""
        c = edm_coefficients(self.process, t, self.sigma_data)
        skip, out, into = (over_dimensions(each, x_t) for each in (c.skip, c.out, c.into))
        return skip * x_t + out * self.network(into * x_t, c.noise, cond)
