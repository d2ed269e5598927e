import torch
from analytic import caption, gaussian_denoiser, gaussian_velocity

from ldm_core.distillation.guidance import guidance_distillation_loss, guided_velocity

NULL, COND = caption(-0.2), caption(0.7, batch=5)
X_T = torch.randn(5, 3, dtype=torch.float64)
T = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)


def test_floor_is_zero_for_the_guided_model():
    def student(x_t, t, cond):  # equal widths: guidance moves the mean to m_u + w (m_c - m_u)
        return gaussian_velocity(x_t, t, caption(-0.2 + 3 * 0.9, batch=5))

    loss = guidance_distillation_loss(student, gaussian_denoiser(), X_T, T, COND, NULL, 3.0)
    assert loss.shape == (5,)
    assert loss.max() < 1e-28


def test_at_scale_one_the_student_is_the_teacher():
    loss = guidance_distillation_loss(
        gaussian_velocity, gaussian_denoiser(), X_T, T, COND, NULL, 1.0
    )
    assert torch.equal(loss, torch.zeros(5, dtype=torch.float64))


def test_the_teacher_gets_no_gradient():
    x_t = X_T.clone().requires_grad_()
    assert not guided_velocity(gaussian_denoiser(), x_t, T, COND, NULL, 2.0).requires_grad
