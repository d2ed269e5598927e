import torch
from exact_gaussian import Gaussian, four_points

from ldm_core.diffusion.preconditioning import edm_coefficients
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.timesteps import log_normal
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.objectives.denoising import denoising_loss
from ldm_core.objectives.uncertainty import LogVariance, uncertainty_weighted


def test_least_at_the_logarithm_of_the_loss():
    loss = torch.tensor([1e-3, 0.3, 1.0, 40.0], dtype=torch.float64)
    u = loss.log().requires_grad_()
    value = uncertainty_weighted(loss, u)
    torch.testing.assert_close(value, 1 + loss.log())
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert slope.abs().max() < 1e-14
    for step in (-0.1, 0.1):
        assert (uncertainty_weighted(loss, u + step) > value).all()


def test_at_its_least_all_noise_levels_have_the_same_gradient():
    loss = torch.tensor([1e-3, 0.3, 40.0], dtype=torch.float64, requires_grad=True)
    weighted = uncertainty_weighted(loss, loss.detach().log())
    (weight,) = torch.autograd.grad(weighted.sum(), loss)
    torch.testing.assert_close(weight * loss.detach(), torch.ones_like(weight))


def test_the_head_learns_the_logarithm_of_the_loss_at_every_noise_level():
    process = VarianceExploding()
    exact = Gaussian(process)
    quantiles = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    t = log_normal(process, quantiles).repeat_interleave(4)
    x0, eps = (points.repeat(40, 1) for points in four_points())
    losses = denoising_loss(exact.x0, process, Prediction.X0, x0, eps, t, None)
    noise = edm_coefficients(process, t, 0.5).noise
    head = LogVariance().double()
    assert torch.equal(head(noise), torch.zeros_like(noise))
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure():
        optimizer.zero_grad()
        loss = uncertainty_weighted(losses, head(noise)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    floor = exact.std**2 * t**2 / (exact.std**2 + t**2)
    assert (head(noise) - floor.log()).abs().max() < 2e-2
