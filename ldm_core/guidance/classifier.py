"""Classifier guidance (Dhariwal & Nichol 2021, Algorithm 2; Song et al. 2021, Eq. 14).

    score of p(x_t) p(y | x_t)^w = score + w g,   g = gradient of ln p(y | x_t) by x_t

With x0 = (x_t + sigma^2 score) / alpha and v = f x_t - (g_t^2 / 2) score that is

    D_w = D + w (sigma^2 / alpha) g,   v_w = v - w sigma (sigma' - alpha' sigma / alpha) g

w = 0 is the plain denoiser here, and w = 1 Bayes' rule: an unconditional denoiser becomes the
conditional one. The classifier has to know noisy data: `classifier_loss` trains it on them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_core.diffusion.denoiser import Condition, DenoiserLike
from ldm_core.diffusion.process import Process, add_noise, batch_time, over_dimensions
from ldm_core.errors import UserError
from ldm_core.guidance.guided import EVERYWHERE, Interval, check_interval, scale_at

Classifier = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t (B,)) -> logits (B, K)."""

LogLikelihood = Callable[[Tensor, Tensor, Condition], Tensor]
"""ln p(y | x_t) up to a constant: (x_t (B, ...), t (B,), y) -> (B,), differentiable by x_t."""


class ClassifierGuidance:
    """A denoiser led to where a condition is likely; the denoiser itself gets the condition too.

    The estimate divides by alpha, which is 0 at pure noise, where the gradient is 0 as well and a
    network's gradient is not quite; so alpha counts as at least `least_alpha` there.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        log_likelihood: LogLikelihood,
        scale: float | Tensor = 1.0,
        interval: Interval = EVERYWHERE,
        least_alpha: float = 0.01,
    ) -> None:
        """`scale` w, one number or one per sample (B,), is 0 outside of `interval`.

        Raises:
            ValueError: as `check_interval`.
        """
        check_interval(interval)
        self.denoiser, self.log_likelihood = denoiser, log_likelihood
        self.scale, self.interval, self.least_alpha = scale, interval, least_alpha

    @property
    def process(self) -> Process:
        """The wrapped denoiser's."""
        return self.denoiser.process

    def denoise(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The guided x0: (B, ...) -> (B, ...)."""
        x0 = self.denoiser.denoise(x_t, t, cond)
        return x0 + self._ascent(x_t, t, cond, self.process.sigma)

    def velocity(self, x_t: Tensor, t: Tensor | float, cond: Condition) -> Tensor:
        """The guided velocity: (B, ...) -> (B, ...)."""
        v = self.denoiser.velocity(x_t, t, cond)
        return v - self._ascent(x_t, t, cond, self._turn)

    def _turn(self, t: Tensor) -> Tensor:
        """alpha sigma' - sigma alpha', the velocity of the angle between data and noise."""
        p = self.process
        return p.alpha(t) * p.sigma_derivative(t) - p.sigma(t) * p.alpha_derivative(t)

    def _ascent(
        self, x_t: Tensor, t: Tensor | float, cond: Condition, rate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """w rate (sigma / alpha) g, (B, ...); 0 without a gradient where no sample is guided.

        Raises:
            UserError: under `torch.inference_mode`, which allows no gradient.
        """
        scale = scale_at(self.scale, x_t, t, self.interval, outside=0.0)
        if not bool(scale.any()):
            return x_t.new_zeros(())
        if torch.is_inference_mode_enabled():
            raise UserError(
                "classifier guidance needs the classifier's gradient, and torch.inference_mode() "
                "allows none: sample under torch.no_grad() instead"
            )
        times = batch_time(t, x_t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_likelihood(x, times, cond).sum(), x)
        times = over_dimensions(times, x_t)
        ratio = self.process.sigma(times) / self.process.alpha(times).clamp(min=self.least_alpha)
        ascent = over_dimensions(scale.to(ratio), x_t) * rate(times) * ratio * gradient
        return ascent.to(x_t.dtype)


def label_likelihood(classifier: Classifier) -> LogLikelihood:
    """ln p(y | x_t) of a classifier over K classes, for labels y (B,)."""

    def log_likelihood(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(classifier(x_t, t), labels, reduction="none")

    return log_likelihood


def classifier_loss(
    classifier: Classifier, process: Process, x0: Tensor, eps: Tensor, t: Tensor, labels: Tensor
) -> Tensor:
    """-ln p(y | x_t) at x_t = alpha_t x0 + sigma_t eps, so that the classifier knows noisy data.

    Args:
        classifier: gives logits.
        process: the denoiser's.
        x0: (B, ...) latents.
        eps: (B, ...) standard normal noise.
        t: (B,) times.
        labels: (B,) classes of x0.

    Returns:
        (B,).
    """
    return F.cross_entropy(classifier(add_noise(process, x0, eps, t), t), labels, reduction="none")
