from itertools import pairwise

import pytest
import torch
from analytic import order
from exact_gaussian import PROCESSES, Gaussian

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.preconditioning import Preconditioned
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, over_dimensions
from ldm_core.diffusion.variance_preserving import TrigFlow
from ldm_core.objectives.consistency import consistency_training_loss, earlier_time
from ldm_core.objectives.regression import mean_square, pseudo_huber

GENERATOR = torch.Generator().manual_seed(0)
X, X0, EPS = torch.randn(3, 16, 3, dtype=torch.float64, generator=GENERATOR)
U = torch.linspace(0.07, 0.93, 16, dtype=torch.float64)
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


@each
def test_the_exact_map_does_not_change_along_the_ode(process):
    exact, t = Gaussian(process), U * process.end
    v = exact.velocity(X, t)
    ends, slope = torch.func.jvp(exact.consistency, (X, t), (v, torch.ones_like(t)))
    assert slope.abs().max() < 1e-13
    assert v.abs().max() > 1
    assert ends.std() > 0.1
    torch.testing.assert_close(exact.consistency(X, 0 * t), X, rtol=0, atol=1e-15)


def raw(x, t, cond):
    return torch.cos(5 * x) + over_dimensions(t, x)


@pytest.mark.parametrize(
    "student",
    [
        Denoiser(raw, FlowProcess(), Prediction.VELOCITY).denoise,
        Denoiser(raw, TrigFlow(), Prediction.V).denoise,
        *(Preconditioned(raw, process) for process in PROCESSES.values()),
    ],
)
def test_candidates_return_the_data_at_time_zero(student):
    assert torch.equal(student(X, torch.zeros_like(U), None), X)


def signed(prediction, target):
    return (target - prediction).mean(dim=1)


@each
def test_training_without_a_teacher_is_right_on_average(process):
    """Given x_t, f moves by O(h) with the data drawn, but only by O(h^2) on average."""
    exact, t = Gaussian(process), U * process.end

    def change(step):
        s = t - step * process.end
        return [
            consistency_training_loss(
                exact.consistency, exact.consistency, process, x0, eps, t, s, None, signed
            )
            for x0, eps in exact.posterior(X, t)
        ]

    steps = (8e-4, 4e-4, 2e-4)
    both = [change(step) for step in steps]
    one = [float(first.abs().mean()) for first, _ in both]
    mean = [float((first + second).div(2).abs().mean()) for first, second in both]
    assert order(one) == pytest.approx(1.0, abs=0.05)
    assert order(mean) == pytest.approx(2.0, abs=0.1)


def test_only_the_student_is_trained():
    student, averaged = (torch.tensor(value, requires_grad=True) for value in (0.9, 1.1))
    exact = Gaussian()

    def scaled(by):
        return lambda x_t, t, cond: by * exact.consistency(x_t, t)

    loss = consistency_training_loss(
        scaled(student), scaled(averaged), exact.process, X0, EPS, U, U / 2, None
    )
    assert loss.shape == (16,)
    loss.mean().backward()
    assert averaged.grad is None
    assert student.grad is not None


@each
def test_the_gap_closes_stage_by_stage(process):
    t = U * process.end
    assert torch.equal(earlier_time(process, t, 0), torch.zeros_like(t))

    def noise(time):
        return process.sigma(time) / process.alpha(time)

    gaps = [(noise(t) - noise(earlier_time(process, t, k))) / noise(t) for k in (5, 6, 7)]
    expected = (1 + 8 * torch.sigmoid(-noise(t))) / 2**5
    torch.testing.assert_close(gaps[0], expected, rtol=1e-8, atol=0)
    for wide, narrow in pairwise(gaps):
        torch.testing.assert_close(wide, 2 * narrow, rtol=1e-8, atol=0)
    first = earlier_time(process, t, 1)  # a gap above the noise level itself is cut at the data
    assert (first >= 0).all()
    assert (first < t).all()


def test_pseudo_huber():
    x = torch.zeros(4, 5, dtype=torch.float64)
    sizes = torch.tensor([0.0, 1e-9, 3e-4, 2.0], dtype=torch.float64)
    loss = pseudo_huber(x + sizes[:, None], x, 3e-4)
    assert loss[0] == 0
    assert loss[1].item() == pytest.approx(1e-18 / 6e-4, rel=1e-8)  # e^2 / 2c
    assert loss[2].item() == pytest.approx(3e-4 * (2**0.5 - 1), rel=1e-12)
    assert loss[3].item() == pytest.approx(2 - 3e-4, rel=1e-6)  # e - c


def test_pseudo_huber_is_the_papers_over_the_root_of_the_dimension():
    x, y = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64) * 1e-3
    c = 0.00054 * 48**0.5
    theirs = ((x - y).square().flatten(1).sum(1) + c**2).sqrt() - c
    torch.testing.assert_close(pseudo_huber(x, y), theirs / 48**0.5)
    assert (pseudo_huber(x, y) <= mean_square(x, y).sqrt()).all()
