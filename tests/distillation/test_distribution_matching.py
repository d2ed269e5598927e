import pytest
import torch
from analytic import caption, gaussian_denoiser
from exact_gaussian import PROCESSES, Gaussian, hermite

from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import add_noise
from ldm_core.distillation.distribution_matching import (
    distribution_matching_loss,
    kl_weight,
    matching_gradient,
    normalising_weight,
)
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.objectives.denoising import denoising_loss
from ldm_core.objectives.regression import mean_square

NODES, WEIGHTS = hermite(60)
Z, EPS = (grid.reshape(-1, 1) for grid in torch.meshgrid(NODES, NODES, indexing="ij"))
WEIGHT = torch.outer(WEIGHTS, WEIGHTS).reshape(-1)
START = (0.2, 0.9)
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def parameters(a, b):
    return torch.tensor([a, b], dtype=torch.float64, requires_grad=True)


def fake_of(process, student):
    """The exact denoiser of what G(z) = a + b z generates."""
    a, b = student.tolist()
    return Gaussian(process, a, abs(b)).denoiser()


def expected_gradient(process, student, share, weight=kl_weight, teacher=None, fake=None):
    """(d/da, d/db) of the loss, averaged over z and eps."""
    t = torch.full((len(Z),), share * process.end, dtype=torch.float64)
    generated = student[0] + student[1] * Z
    gradient = matching_gradient(
        generated, teacher or Gaussian(process).denoiser(), fake or fake_of(process, student),
        EPS, t, None, weight,
    )  # fmt: skip
    loss = (WEIGHT * distribution_matching_loss(generated, gradient)).sum()
    return torch.autograd.grad(loss, student)[0]


def kl_slope(process, student, share):
    """d KL(N(alpha a, alpha^2 b^2 + sigma^2) || N(alpha m, alpha^2 S^2 + sigma^2))."""
    exact = Gaussian(process)
    t = torch.tensor(share * process.end, dtype=torch.float64)
    alpha, variance = exact.moments(t, student)
    ours = alpha**2 * student[1] ** 2 + process.sigma(t) ** 2
    away = alpha**2 * (student[0] - exact.mean) ** 2
    kl = ((variance / ours).log() + (ours + away) / variance - 1) / 2
    return torch.autograd.grad(kl, student)[0]


@each
@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("student", [START, (0.7, 0.1), (-1.0, -0.4)])
def test_the_gradient_is_that_of_the_divergence(process, share, student):
    student = parameters(*student)
    found, exact = expected_gradient(process, student, share), kl_slope(process, student, share)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("weight", [kl_weight, normalising_weight])
def test_no_gradient_only_where_the_distributions_are_one(weight):
    process = PROCESSES["flow"]
    for b in (0.4, -0.4):
        at_rest = expected_gradient(process, parameters(0.7, b), 0.4, weight)
        assert at_rest.abs().max() < 1e-14
    for a, b in ((0.6, 0.4), (0.7, 0.3), (0.7, 0.5), (0.8, -0.4), (0.7, -0.5)):
        moving = expected_gradient(process, parameters(a, b), 0.4, weight)
        assert moving.abs().max() > 1e-3


def test_descent_arrives():
    process, student = PROCESSES["flow"], parameters(*START)
    for step in range(600):
        share = (0.2, 0.5, 0.8)[step % 3]
        gradient = expected_gradient(process, student, share, normalising_weight)
        with torch.no_grad():
            student -= 0.1 * gradient
    assert student.tolist() == pytest.approx([0.7, 0.4], abs=1e-12)


def test_under_guidance_it_arrives_at_the_guided_distribution():
    """Equal widths: N(m_u + w (m_c - m_u), S^2)."""
    batch = len(Z)
    guided = ClassifierFreeGuidance(gaussian_denoiser(), 3.0, caption(-0.2))
    t = torch.full((batch,), 0.4, dtype=torch.float64)

    def gradient(a):
        generated = a + 0.4 * Z
        fake = Gaussian(None, a, 0.4).denoiser()
        cond = caption(0.7, batch=batch)
        return matching_gradient(generated, guided, fake, EPS, t, cond, kl_weight)

    assert gradient(-0.2 + 3 * 0.9).abs().max() < 1e-12
    assert gradient(0.7).abs().max() > 0.1


@each
def test_the_fake_denoiser_that_fits_best_is_the_exact_one(process):
    """Denoising is quadratic in D = p + q x_t, so one Newton step from anywhere is the minimum."""
    student = parameters(*START)
    t = torch.full((len(Z),), 0.4 * process.end, dtype=torch.float64)
    generated = (student[0] + student[1] * Z).detach()

    def loss(line):
        def affine(x_t, t, cond):
            return line[0] + line[1] * x_t

        losses = denoising_loss(affine, process, Prediction.X0, generated, EPS, t, None)
        return (WEIGHT * losses).sum()

    start = torch.tensor([0.3, -0.2], dtype=torch.float64)
    slope = torch.func.grad(loss)(start)
    best = start - torch.linalg.solve(torch.func.hessian(loss)(start), slope)
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at_probe = fake_of(process, student).denoise(probe, t[:2], None)[:, 0]
    expected = torch.stack([at_probe[0], at_probe[1] - at_probe[0]])
    torch.testing.assert_close(best, expected, rtol=1e-10, atol=1e-12)


def test_gradients_stop_at_the_denoisers():
    process, student = PROCESSES["flow"], parameters(*START)
    t = torch.full((len(Z),), 0.4, dtype=torch.float64)
    generated = student[0] + student[1] * Z
    teacher, fake = Gaussian(process).denoiser(), fake_of(process, student)
    gradient = matching_gradient(generated, teacher, fake, EPS, t, None, kl_weight)
    assert not gradient.requires_grad
    exact = kl_slope(process, student, 0.4)

    def slope(loss):
        return torch.autograd.grad((WEIGHT * loss).sum(), student, retain_graph=True)[0]

    tracked = matching_gradient.__wrapped__(generated, teacher, fake, EPS, t, None, kl_weight)
    x_t = add_noise(process, generated, EPS, t)
    aim = (fake.denoise(x_t, t, None) - teacher.denoise(x_t, t, None)).detach()
    mutants = {
        "through the gradient": mean_square(generated, generated.detach() - tracked) / 2,
        "nothing stopped": mean_square(generated, generated - tracked) / 2,
        "unweighted": mean_square(generated, (generated - aim).detach()) / 2,
    }
    for name, loss in mutants.items():
        assert (slope(loss) - exact).abs().max() > 1e-2, name
    right = slope(distribution_matching_loss(generated, tracked))
    torch.testing.assert_close(right, exact, rtol=1e-10, atol=0)


def test_normalised_gradients_have_the_size_of_the_relative_difference():
    generated, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t, teacher = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), Gaussian()
    fake = Gaussian(None, 0.1, 0.8)
    gradient = matching_gradient(generated, teacher.denoiser(), fake.denoiser(), eps, t, None)
    x_t = add_noise(teacher.process, generated, eps, t)
    for i in range(3):
        real, imitated = (data.x0(x_t[i], t[i]) for data in (teacher, fake))
        expected = (imitated - real) / (generated[i] - real).abs().mean()
        torch.testing.assert_close(gradient[i], expected)
    loss = distribution_matching_loss(generated, gradient)
    torch.testing.assert_close(loss, gradient.square().flatten(1).mean(1) / 2)
