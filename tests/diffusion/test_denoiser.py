import pytest
import torch
from analytic import caption, gaussian_velocity, gaussian_x0

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess

COND = caption(0.7, batch=4)


def exact(prediction):
    def eps(x_t, t, cond):
        return x_t + (1 - t)[:, None] * gaussian_velocity(x_t, t, cond)

    networks = {
        Prediction.X0: gaussian_x0,
        Prediction.EPS: eps,
        Prediction.VELOCITY: gaussian_velocity,
        Prediction.V: lambda x, t, c: (
            (1 - t)[:, None] * eps(x, t, c) - t[:, None] * gaussian_x0(x, t, c)
        ),
        Prediction.SCORE: lambda x, t, c: -eps(x, t, c) / t[:, None],
    }
    return Denoiser(networks[prediction], FlowProcess(), prediction)


@pytest.mark.parametrize("prediction", Prediction)
def test_same_answers_whatever_the_network_predicts(prediction):
    x_t = torch.randn(4, 3, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    denoiser = exact(prediction)
    torch.testing.assert_close(denoiser.denoise(x_t, t, COND), gaussian_x0(x_t, t, COND))
    torch.testing.assert_close(denoiser.velocity(x_t, t, COND), gaussian_velocity(x_t, t, COND))


def test_one_time_serves_the_batch():
    x_t = torch.randn(4, 3, dtype=torch.float64)
    denoiser = exact(Prediction.VELOCITY)
    expected = denoiser.denoise(x_t, torch.full((4,), 0.3, dtype=torch.float64), COND)
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        assert torch.equal(denoiser.denoise(x_t, t, COND), expected)
