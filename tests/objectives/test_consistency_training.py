"""Which networks can be consistency models, what of them is trained, and at which times."""

from itertools import pairwise

import pytest
import torch
from exact_gaussian import PROCESSES, Gaussian

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.preconditioning import Preconditioned
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, over_dimensions
from ldm_core.diffusion.variance_preserving import TrigFlow
from ldm_core.objectives.consistency import consistency_training_loss, earlier_time

GENERATOR = torch.Generator().manual_seed(0)
X, X0, EPS = torch.randn(3, 16, 3, dtype=torch.float64, generator=GENERATOR)
U = torch.linspace(0.07, 0.93, 16, dtype=torch.float64)
each = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


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
