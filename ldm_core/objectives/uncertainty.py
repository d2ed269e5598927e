"""A learned loss weight: the logarithm of the expected loss at each noise level.

Minimising e exp(-u) + u over u gives u = ln E[e], so the weight exp(-u) is one over the expected
loss and every noise level contributes alike, however difficult (Kendall et al. 2018; Karras et al.
2024, Eq. 21). The head is not needed after training.
"""

from torch import Tensor, nn

from ldm_core.backbones.embeddings import geometric_waves


def uncertainty_weighted(loss: Tensor, log_variance: Tensor) -> Tensor:
    """e exp(-u) + u for the loss e (B,) and its predicted logarithm u (B,): (B,)."""
    return loss * (-log_variance).exp() + log_variance


class LogVariance(nn.Module):
    """u of a noise level: linear in sines and cosines of it, 0 before training.

    The frequencies run geometrically from 1/4 to 16 radians, for noise levels of size 1 such as
    c_noise = ln(sigma / alpha) / 4.
    """

    lowest, highest, pairs = 0.25, 16.0, 32

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * self.pairs, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, noise: Tensor) -> Tensor:
        """(B,) finite levels -> (B,)."""
        waves = geometric_waves(noise, self.lowest, self.highest, self.pairs)
        return self.linear(waves.to(self.linear.weight.dtype)).squeeze(1)
