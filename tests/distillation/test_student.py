"""Which loss at which step, over which leaps; and what the losses are where all is known."""

from collections import Counter

import pytest
import torch
from analytic import (
    MEAN,
    caption,
    gaussian_average_velocity,
    gaussian_denoiser,
    gaussian_velocity,
    order,
)
from tiny_project import SIZE, WIDTH, backbone, random_network

from ldm_core.conditioning.text import TextCondition
from ldm_core.distillation.student import DistillationLosses, student_of
from ldm_core.training.draws import Draws, draw

GUIDANCE_STEPS, GUIDANCE, NULL_MEAN = 2, 3.0, -0.2
STEP_OF = {"guidance": 0, "trajectory": 4, "shortcut": 7}
# between distributions of equal width, guidance moves the mean and nothing else
GUIDED_MEAN = NULL_MEAN + GUIDANCE * (MEAN - NULL_MEAN)
IDS = torch.arange(12) * 7


def exact(x_t, t, r, cond):
    """The flow map of the guided data."""
    return gaussian_average_velocity(x_t, t, r, caption(GUIDED_MEAN, batch=len(x_t)))


def instant(x_t, t, r, cond):
    """The guided velocity, whatever the interval: right where r = t, else a rough student."""
    return gaussian_velocity(x_t, t, caption(GUIDED_MEAN, batch=len(x_t)))


def losses(student=exact, averaged=exact, student_steps=4, teacher_substeps=4):
    return DistillationLosses(
        student,
        averaged,
        gaussian_denoiser(),
        caption(NULL_MEAN),
        GUIDANCE,
        GUIDANCE_STEPS,
        student_steps,
        teacher_substeps,
    )


def loss_at(phase, ids=IDS, **changes):
    """(B,): the loss of samples whose data, noise and times follow from their ids."""
    name, loss = losses(**changes).at(STEP_OF[phase])
    assert name == phase
    x0 = MEAN + 0.1 * ids[:, None] / 77 + torch.zeros(len(ids), 3, dtype=torch.float64)
    return loss(x0, draw(0, STEP_OF[phase], ids, (3,), 0.0), caption(MEAN, batch=len(ids)))


def leaps(phase, u, v, student_steps):
    """(t, r) that the student is asked for, for uniform numbers u and v (B,)."""
    asked = []

    def spy(x_t, t, r, cond):
        asked.append((t, r))
        return torch.zeros_like(x_t)

    _, loss = losses(student=spy, student_steps=student_steps).at(STEP_OF[phase])
    x0 = torch.zeros(len(u), 3, dtype=torch.float64)
    no_drop = torch.zeros(len(u), dtype=bool)
    loss(x0, Draws(torch.zeros_like(x0), u, v, no_drop), caption(MEAN, batch=len(u)))
    return asked[0]


def grid_of_uniforms(count):
    """Every pair of `count` stratified numbers in (0, 1), u and v (count^2,)."""
    strata = (torch.arange(count) + 0.5) / count
    return strata.repeat(count), strata.repeat_interleave(count)


def test_the_phases_in_their_order():
    phases = [losses().at(step)[0] for step in range(10)]
    assert phases == ["guidance"] * 2 + ["trajectory", "shortcut"] + ["trajectory"] * 3 + [
        "shortcut", "trajectory", "trajectory",
    ]  # fmt: skip
    assert {losses(student_steps=1).at(step)[0] for step in range(2, 10)} == {"trajectory"}


def test_a_trajectory_spans_each_of_the_students_steps_equally_often():
    t, r = leaps("trajectory", *grid_of_uniforms(16), student_steps=4)
    assert Counter(zip(t.tolist(), r.tolist(), strict=True)) == {
        (1.0, 0.75): 64, (0.75, 0.5): 64, (0.5, 0.25): 64, (0.25, 0.0): 64,
    }  # fmt: skip


def test_longer_leaps_are_halved_steps_each_halving_and_each_place_equally_often():
    t, r = leaps("shortcut", *grid_of_uniforms(12), student_steps=8)
    lengths, places = t - r, r / (t - r)
    assert Counter(lengths.tolist()) == {1.0: 48, 0.5: 48, 0.25: 48}
    for length, count in ((1.0, 1), (0.5, 2), (0.25, 4)):
        found = Counter(places[lengths == length].tolist())
        assert found == {float(place): 48 // count for place in range(count)}


@pytest.mark.parametrize("phase", STEP_OF)
def test_uniform_numbers_next_to_the_ends_stay_within_the_path(phase):
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    t, r = leaps(phase, ends, ends, student_steps=4)
    assert ((r >= 0) & (r <= t) & (t <= 1)).all()


def test_the_floor_is_zero_where_the_student_is_right():
    assert loss_at("guidance", student=instant).max() < 1e-26
    assert loss_at("shortcut").max() < 1e-24
    errors = [float(loss_at("trajectory", teacher_substeps=n).max()) for n in (40, 80, 160)]
    assert order(errors) == pytest.approx(2, abs=0.2)  # the square of Euler's order


def test_no_phase_takes_a_rough_student_for_a_right_one():
    assert loss_at("trajectory", student=instant, teacher_substeps=64).mean() > 1e-3
    assert loss_at("shortcut", student=instant).mean() > 1e-3
    assert loss_at("shortcut", averaged=instant).mean() > 1e-3


@pytest.mark.parametrize("phase", STEP_OF)
def test_a_samples_loss_does_not_depend_on_how_the_batch_is_split(phase):
    whole = loss_at(phase, student=instant)
    for world in (2, 3):
        for rank in range(world):
            share = loss_at(phase, IDS[rank::world], student=instant)
            torch.testing.assert_close(share, whole[rank::world], rtol=1e-12, atol=1e-12)


def test_a_student_begins_as_its_teacher_over_every_interval():
    teacher = random_network(backbone())
    student = student_of(teacher)
    x_t, t = torch.randn(3, 3, SIZE, SIZE), torch.tensor([0.9, 0.5, 0.2])
    cond = TextCondition(
        torch.randn(3, 2, WIDTH), torch.ones(3, 2, dtype=bool), torch.randn(3, WIDTH)
    )
    for r in (t, t / 2, torch.zeros(3)):
        torch.testing.assert_close(student(x_t, t, cond, r), teacher(x_t, t, cond))
    for name, weight in student_of(teacher).state_dict().items():
        assert torch.equal(weight, student.state_dict()[name])
