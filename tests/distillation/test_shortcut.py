import pytest
import torch
from analytic import caption, gaussian_average_velocity, gaussian_map, gaussian_velocity

from ldm_core.diffusion.process import over_dimensions
from ldm_core.distillation.shortcut import shortcut_loss, two_halves

B = 64
COND = caption(0.7, batch=B)
GENERATOR = torch.Generator().manual_seed(0)
X_T = torch.randn(B, 3, dtype=torch.float64, generator=GENERATOR)
T = torch.empty(B, dtype=torch.float64).uniform_(0.3, 1.0, generator=GENERATOR)
R = T * torch.empty(B, dtype=torch.float64).uniform_(0.0, 0.8, generator=GENERATOR)
EXACT = gaussian_average_velocity


def test_the_exact_map_is_consistent_with_itself():
    loss = shortcut_loss(EXACT, EXACT, X_T, T, R, COND)
    assert loss.shape == (B,)
    assert loss.max() < 1e-24


def test_two_halves_land_where_the_two_leaps_do():
    def rough(x_t, t, r, cond):  # no flow map: where one lands depends on the way
        return gaussian_velocity(x_t, t, cond)

    middle = (T + R) / 2
    x = X_T
    for start, end in ((T, middle), (middle, R)):
        x = x - over_dimensions(start - end, x) * rough(x, start, end, COND)
    landed = X_T - over_dimensions(T - R, X_T) * two_halves(rough, X_T, T, R, COND)
    torch.testing.assert_close(landed, x)
    assert shortcut_loss(rough, rough, X_T, T, R, COND).mean() > 1e-3


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
