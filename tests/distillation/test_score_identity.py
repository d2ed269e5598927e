import pytest
import torch
from exact_gaussian import PROCESSES, Gaussian, hermite

from ldm_core.diffusion.process import add_noise
from ldm_core.distillation.distribution_matching import kl_weight, normalising_weight
from ldm_core.distillation.score_identity import score_identity_loss

NODES, WEIGHTS = hermite(20)
Z, EPS = (grid.reshape(-1, 1) for grid in torch.meshgrid(NODES, NODES, indexing="ij"))
WEIGHT = torch.outer(WEIGHTS, WEIGHTS).reshape(-1)
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def unweighted(process, generated, estimate, t):
    return torch.ones_like(t)


def setting(process, a, b, share):
    student = torch.tensor([a, b], dtype=torch.float64, requires_grad=True)
    t = torch.full((len(Z),), share * process.end, dtype=torch.float64)
    return student, student[0] + student[1] * Z, Gaussian(process, a, abs(b)), t


def expected_loss(process, a, b, share, k, weight=unweighted):
    student, generated, fake, t = setting(process, a, b, share)
    teacher = Gaussian(process).denoiser()
    losses = score_identity_loss(generated, teacher, fake.denoiser(), EPS, t, None, k, weight)
    assert losses.shape == t.shape
    return (WEIGHT * losses).sum(), student


def slope(process, a, b, share, k, weight=unweighted):
    loss, student = expected_loss(process, a, b, share, k, weight)
    return torch.autograd.grad(loss, student)[0]


def closed_form(process, a, b, share, k):
    """With D = m (1 - alpha c) + c x_t, c = alpha S^2 / V, for the teacher (T) and the fake (F):

    d/da = (m - a)(1 - alpha c_T) [2 (1 - k) alpha q - (1 - alpha c_F)]
    d/db = 2 alpha b q [(1 - k) alpha q - (1 - alpha c_F)],     q = c_T - c_F
    """
    exact, t = Gaussian(process), torch.tensor(share * process.end, dtype=torch.float64)
    alpha, v_teacher = exact.moments(t, t)
    v_fake = alpha**2 * b**2 + process.sigma(t) ** 2
    c_teacher, c_fake = alpha * exact.std**2 / v_teacher, alpha * b**2 / v_fake
    q, rest = c_teacher - c_fake, 1 - alpha * c_fake
    by_a = (exact.mean - a) * (1 - alpha * c_teacher) * (2 * (1 - k) * alpha * q - rest)
    by_b = 2 * alpha * b * q * ((1 - k) * alpha * q - rest)
    return torch.stack([by_a, by_b])


@each
@pytest.mark.parametrize("k", [0.0, 1.0, 1.2])
@pytest.mark.parametrize("student", [(0.2, 0.9), (0.7, 0.1), (-1.0, -0.4)])
def test_the_gradient_is_the_closed_form(process, k, student):
    for share in (0.05, 0.4, 0.9):
        torch.testing.assert_close(
            slope(process, *student, share, k), closed_form(process, *student, share, k),
            rtol=1e-9, atol=1e-12,
        )  # fmt: skip


@each
@pytest.mark.parametrize("k", [0.0, 1.0, 1.2])
def test_its_value_is_a_share_of_the_fisher_divergence(process, k):
    """E[(D_T - D_F) . (D_F - G)] = 0 for the student's exact denoiser."""
    loss, _ = expected_loss(process, 0.2, 0.9, 0.4, k)
    _, generated, fake, t = setting(process, 0.2, 0.9, 0.4)
    x_t = add_noise(process, generated, EPS, t)
    apart = Gaussian(process).x0(x_t, t) - fake.x0(x_t, t)
    divergence = (WEIGHT * apart.square()[:, 0]).sum()
    torch.testing.assert_close(loss, (1 - k) * divergence, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("weight", [unweighted, kl_weight, normalising_weight])
def test_no_gradient_where_the_distributions_are_one(weight):
    for b in (0.4, -0.4):
        assert slope(PROCESSES["flow"], 0.7, b, 0.4, 1.0, weight).abs().max() < 1e-14
    for a, b in ((0.6, 0.4), (0.7, 0.3), (0.7, 0.5), (0.8, -0.4)):
        assert slope(PROCESSES["flow"], a, b, 0.4, 1.0, weight).abs().max() > 1e-3


@pytest.mark.parametrize("k", [1.0, 1.2])
def test_descent_arrives(k):
    student = torch.tensor([0.2, 0.9], dtype=torch.float64)
    for step in range(600):
        student = student - 0.3 * slope(
            PROCESSES["flow"], *student.tolist(), (0.3, 0.5, 0.8)[step % 3], k
        )
    assert student.tolist() == pytest.approx([0.7, 0.4], abs=1e-10)


def test_denoisers_without_gradients_are_caught():
    process = PROCESSES["flow"]
    student, generated, fake, t = setting(process, 0.2, 0.9, 0.4)

    class Stopped:
        def __init__(self, inner):
            self.inner, self.process = inner, inner.process

        @torch.no_grad()
        def denoise(self, x_t, t, cond):
            return self.inner.denoise(x_t, t, cond)

    losses = score_identity_loss(
        generated, Stopped(Gaussian(process).denoiser()), Stopped(fake.denoiser()),
        EPS, t, None, 1.0, unweighted,
    )  # fmt: skip
    (found,) = torch.autograd.grad((WEIGHT * losses).sum(), student)
    assert (found - closed_form(process, 0.2, 0.9, 0.4, 1.0)).abs().max() > 1e-2
