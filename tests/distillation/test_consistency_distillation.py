import pytest
import torch
from analytic import order
from exact_gaussian import PROCESSES, Gaussian

from ldm_core.distillation.consistency import consistency_distillation_loss
from ldm_core.distillation.trajectory import euler_slope, heun_slope
from ldm_core.objectives.regression import mean_square

GENERATOR = torch.Generator().manual_seed(0)
X_T = torch.randn(16, 3, dtype=torch.float64, generator=GENERATOR)
U = torch.linspace(0.3, 0.9, 16, dtype=torch.float64)


@pytest.mark.parametrize("name", ["flow", "trig", "ve"])
@pytest.mark.parametrize(("slope", "expected"), [(euler_slope, 2.0), (heun_slope, 3.0)])
def test_the_exact_map_is_left_with_the_teachers_local_error(name, slope, expected):
    exact = Gaussian(PROCESSES[name])
    t, f = U * exact.process.end, exact.consistency
    residuals = []
    for h in (0.02, 0.01, 0.005):
        s = t - h * exact.process.end
        loss = consistency_distillation_loss(
            f, f, exact.velocity, X_T, t, s, None, slope, mean_square
        )
        assert loss.shape == (16,)
        residuals.append(loss.mean().sqrt().item())
    assert order(residuals) == pytest.approx(expected, abs=0.15)


def test_a_map_to_elsewhere_is_caught():
    exact = Gaussian()

    def denoiser(x_t, t, cond):  # leads to the mean of the data, not along the trajectory
        return exact.x0(x_t, t)

    arguments = (exact.velocity, X_T, U, U - 0.01, None, heun_slope, mean_square)
    wrong = consistency_distillation_loss(denoiser, denoiser, *arguments).mean()
    right = consistency_distillation_loss(exact.consistency, exact.consistency, *arguments).mean()
    assert wrong > 1e4 * right


def test_an_aim_at_the_same_time_is_not_consistency():
    """f(x_t, t) against f(x^_s, t), the time forgotten: of order 1."""
    exact, residuals = Gaussian(), []
    for h in (0.04, 0.02, 0.01):

        def late(x_s, s, cond, h=h):
            return exact.consistency(x_s, s + h)

        loss = consistency_distillation_loss(
            exact.consistency, late, exact.velocity, X_T, U, U - h, None, heun_slope, mean_square
        )
        residuals.append(loss.mean().sqrt().item())
    assert order(residuals) == pytest.approx(1.0, abs=0.15)


def test_only_the_student_is_trained():
    student, averaged, teacher = (torch.tensor(v, requires_grad=True) for v in (0.9, 1.1, 1.0))
    exact = Gaussian()

    def scaled(function, by):
        return lambda x_t, t, cond: by * function(x_t, t)

    consistency_distillation_loss(
        scaled(exact.consistency, student), scaled(exact.consistency, averaged),
        scaled(exact.velocity, teacher), X_T, U, U - 0.1, None,
    ).mean().backward()  # fmt: skip
    assert averaged.grad is None
    assert teacher.grad is None
    assert student.grad is not None
