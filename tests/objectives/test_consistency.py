"""What the loss says of the exact map, and of maps that are wrong in one way each."""

import pytest
import torch
from analytic import order
from exact_gaussian import PROCESSES, Gaussian, four_points

from ldm_core.diffusion.preconditioning import Preconditioned
from ldm_core.diffusion.process import over_dimensions
from ldm_core.objectives.consistency import consistency_training_loss
from ldm_core.objectives.regression import mean_square

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(16, 3, dtype=torch.float64, generator=GENERATOR)
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


def on_one_trajectory(exact, x, t, s):
    """The (x0, eps) whose states at t and at s are x and where the ODE takes x from t to s."""
    y, process = exact.flow_map(x, t, s), exact.process
    t, s = over_dimensions(t, x), over_dimensions(s, x)
    at_t, at_s = ((process.alpha(time), process.sigma(time)) for time in (t, s))
    area = at_t[0] * at_s[1] - at_s[0] * at_t[1]
    return (at_s[1] * x - at_t[1] * y) / area, (at_t[0] * y - at_s[0] * x) / area


def loss_on_a_trajectory(exact, student, averaged, share):
    """The loss itself on such pairs, at t and at s, that share of t."""
    t = U * exact.process.end
    x0, eps = on_one_trajectory(exact, X, t, share * t)
    return consistency_training_loss(
        student, averaged, exact.process, x0, eps, t, share * t, None, mean_square
    )


@each
@pytest.mark.parametrize("share", [0.0, 0.6, 0.95])
def test_the_loss_of_the_exact_map_is_zero_along_a_trajectory(process, share):
    f = Gaussian(process).consistency
    loss = loss_on_a_trajectory(Gaussian(process), f, f, share)
    assert loss.shape == (16,)
    assert loss.max() < 1e-22


def late(f):
    return lambda x, t, cond: f(x, 1.1 * t, cond)


@each
def test_a_wrong_map_or_time_is_seen_along_a_trajectory(process):
    """Mutations: a denoiser for the map, a time that is not the state's, the map of other data."""
    exact = Gaussian(process)
    f, wider = exact.consistency, Gaussian(process, std=1.2 * exact.std).consistency
    for student, averaged in ((exact.x0, exact.x0), (late(f), f), (f, late(f)), (wider, wider)):
        assert loss_on_a_trajectory(exact, student, averaged, 0.6).mean() > 1e-5


@each
def test_a_wrong_end_is_seen_at_time_zero_alone(process):
    """A map that ends 0.1 beside the data is as consistent as the exact one. What tells them apart
    is that the aim at s = 0 is the data itself, as any candidate has it.
    """
    exact = Gaussian(process)
    candidate = Preconditioned(lambda x, t, cond: (5 * x).cos(), process)

    def beside(x, t, cond):
        return exact.consistency(x, t) + 0.1

    assert loss_on_a_trajectory(exact, beside, beside, 0.6).max() < 1e-22
    assert loss_on_a_trajectory(exact, exact.consistency, candidate, 0.0).max() < 1e-22
    missed = loss_on_a_trajectory(exact, beside, candidate, 0.0)
    torch.testing.assert_close(missed, torch.full_like(missed, 0.01))


@each
def test_the_mean_loss_of_the_exact_map_is_a_chord(process):
    """f(x_t) - m has the angle phi = atan(sigma / (alpha S)) in the plane of the data and the
    noise, so that the mean over both is (2 S sin((phi_t - phi_s) / 2))^2: order 2 in the step.
    """
    exact, t = Gaussian(process), U * process.end
    f, (x0, eps) = exact.consistency, four_points()

    def mean_loss(step):
        s = t * (1 - step)
        pairs = ((x.expand(16, 1), e.expand(16, 1)) for x, e in zip(x0, eps, strict=True))
        return sum(
            consistency_training_loss(f, f, process, x, e, t, s, None, mean_square) / 4
            for x, e in pairs
        )

    def angle(time):
        return torch.atan2(process.sigma(time), process.alpha(time) * exact.std)

    steps = (0.04, 0.02, 0.01)
    for step in steps:
        chord = 2 * exact.std * ((angle(t) - angle(t * (1 - step))) / 2).sin()
        torch.testing.assert_close(mean_loss(step), chord.square(), rtol=1e-9, atol=1e-15)
    assert order([float(mean_loss(step).mean()) for step in steps]) == pytest.approx(2, abs=0.1)


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
