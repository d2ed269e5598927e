import pytest
import torch
from analytic import (
    Mixture,
    caption,
    gaussian_average_velocity,
    gaussian_map,
    gaussian_velocity,
    order,
)

from ldm_core.diffusion.process import over_dimensions
from ldm_core.distillation.shortcut import shortcut_loss, two_halves

B = 64
COND = caption(0.7, batch=B)
GENERATOR = torch.Generator().manual_seed(0)
X_T = torch.randn(B, 3, dtype=torch.float64, generator=GENERATOR)
T = torch.empty(B, dtype=torch.float64).uniform_(0.3, 1.0, generator=GENERATOR)
R = T * torch.empty(B, dtype=torch.float64).uniform_(0.0, 0.8, generator=GENERATOR)
EXACT = gaussian_average_velocity


def euler(x_t, t, r, cond):
    """One step of Euler's method, whatever its length: no flow map."""
    return gaussian_velocity(x_t, t, cond)


class OfMixture:
    """Average velocities of the three-component mixture, for batches at one time."""

    mixture = Mixture()

    def exact(self, x_t, t, r, cond):
        """By quantiles, so no solver is involved."""
        x_r = self.mixture.flow_map(x_t[:, 0].numpy(), float(t[0]), float(r[0]))
        return (x_t - torch.from_numpy(x_r)[:, None]) / over_dimensions(t - r, x_t)

    def euler(self, x_t, t, r, cond):
        return self.mixture.denoiser().velocity(x_t, t, cond)


def in_steps(u, k):
    """The average velocity of k leaps of equal length."""

    def composed(x_t, t, r, cond):
        x, step = x_t, (t - r) / k
        for i in range(k):
            start = t - i * step
            x = x - over_dimensions(step, x) * u(x, start, start - step, cond)
        return (x_t - x) / over_dimensions(t - r, x)

    return composed


OF_MIXTURE = OfMixture()
FULL = torch.full((B,), 0.9, dtype=torch.float64), torch.full((B,), 0.1, dtype=torch.float64)
DATA = pytest.mark.parametrize(
    ("exact", "euler", "x_t", "times"),
    [(EXACT, euler, X_T, (T, R)), (OF_MIXTURE.exact, OF_MIXTURE.euler, X_T[:, :1], FULL)],
    ids=["gaussian", "mixture"],
)


@DATA
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_exact_map_is_consistent_in_any_number_of_leaps(exact, euler, x_t, times, k):
    """Semigroup property: one leap, k of them or 2 k in the target are the same map."""
    for student, averaged in ((exact, in_steps(exact, k)), (in_steps(exact, k), exact)):
        loss = shortcut_loss(student, averaged, x_t, *times, COND)
        assert loss.shape == (B,)
        assert loss.max() < 1e-22


@DATA
@pytest.mark.parametrize("k", [1, 2, 4])
def test_eulers_map_is_not(exact, euler, x_t, times, k):
    """Beside itself and beside the exact one; k = 2 of its leaps are its two halves by definition,
    which the loss does not tell from a flow map's.
    """
    itself = shortcut_loss(in_steps(euler, k), euler, x_t, *times, COND).mean()
    assert itself < 1e-24 if k == 2 else itself > 1e-3
    assert shortcut_loss(in_steps(euler, k), exact, x_t, *times, COND).mean() > 1e-3
    assert shortcut_loss(exact, in_steps(euler, k), x_t, *times, COND).mean() > 1e-4


@DATA
def test_a_solver_becomes_consistent_by_its_order(exact, euler, x_t, times):
    """k leaps of Euler's method beside 2 k of them: 1 / k apart, 1 / k^2 in the square."""
    maps = [in_steps(euler, k) for k in (32, 64, 128)]
    losses = [float(shortcut_loss(u, u, x_t, *times, COND).mean()) for u in maps]
    assert order(losses) == pytest.approx(2, abs=0.1)


def test_over_short_leaps_eulers_loss_is_its_local_error():
    """(h / 4 dv/dt)^2 along the trajectory, h = t - r."""
    velocity = gaussian_velocity(X_T, T, COND)
    _, change = torch.func.jvp(
        lambda x, t: gaussian_velocity(x, t, COND), (X_T, T), (velocity, torch.ones_like(T))
    )
    expected = (change / 4).square().mean(dim=1)
    found = [shortcut_loss(euler, euler, X_T, T, T - h, COND) / h**2 for h in (2e-3, 1e-3)]
    torch.testing.assert_close(2 * found[1] - found[0], expected, rtol=1e-3, atol=1e-6)


def test_two_halves_land_where_the_two_leaps_do():
    middle = (T + R) / 2
    x = X_T
    for start, end in ((T, middle), (middle, R)):
        x = x - over_dimensions(start - end, x) * euler(x, start, end, COND)
    landed = X_T - over_dimensions(T - R, X_T) * two_halves(euler, X_T, T, R, COND)
    torch.testing.assert_close(landed, x)


def test_the_exact_map_has_the_semigroup_property():
    s = 0.3 * T + 0.7 * R  # any time between, not the middle alone
    by_way_of_s = gaussian_map(gaussian_map(X_T, T, s, COND), s, R, COND)
    exact = gaussian_map(X_T, T, R, COND)
    torch.testing.assert_close(by_way_of_s, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_another_middle_is_caught(share):
    def wrong_middle(x_t, t, r, cond):
        """Leaps as the exact map does, but over another interval than asked for."""
        return EXACT(x_t, t, t - 2 * share * (t - r), cond)

    end = T * 0.3  # so that the longer leap stays above 0
    loss = shortcut_loss(EXACT, wrong_middle, X_T, T, end, COND)
    assert loss.mean() > 1e-4


def test_only_the_student_is_trained():
    student, averaged = (torch.tensor(value, requires_grad=True) for value in (0.9, 1.1))

    def scaled(by):
        return lambda x_t, t, r, cond: by * EXACT(x_t, t, r, cond)

    shortcut_loss(scaled(student), scaled(averaged), X_T, T, R, COND).mean().backward()
    assert averaged.grad is None
    assert student.grad < 0  # it is to grow towards the average's 1.1


def test_the_target_is_the_averages():
    def constant(value):
        return lambda x_t, t, r, cond: torch.full_like(x_t, value)

    loss = shortcut_loss(constant(1.0), constant(3.0), X_T, T, R, COND)
    torch.testing.assert_close(loss, torch.full_like(loss, 4.0))
