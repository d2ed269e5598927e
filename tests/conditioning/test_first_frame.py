import pytest
import torch
from analytic import caption

from ldm_core.conditioning.first_frame import (
    FirstFrameDenoiser,
    first_frame_channels,
    put_first_frame,
)
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas
from ldm_core.errors import UserError
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.samplers.euler import sample_euler
from ldm_core.samplers.heun import sample_heun

PROCESSES = [FlowProcess(), VarianceExploding(), VPSDE(), DiscreteVP(linear_betas()), TrigFlow()]
T = 4
FRAME = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
X_T = torch.randn(2, 3, T, 4, 4, dtype=torch.float64)


def copying(process):
    """Predicts that every frame is what it sees in the first."""
    return Denoiser(lambda x_t, t, c: x_t[:, :, :1].expand_as(x_t), process, Prediction.X0)


def test_channels_are_the_frame_and_where_it_is():
    channels = first_frame_channels(FRAME, T)
    assert channels.shape == (2, 4, T, 4, 4)
    assert torch.equal(channels[:, :3, :1], FRAME)
    assert (channels[:, 3, 0] == 1).all()
    assert channels[:, :, 1:].count_nonzero() == 0


@pytest.mark.parametrize("process", [FlowProcess(), TrigFlow(), VarianceExploding()])
@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_a_video_begins_with_its_frame(sampler, process):
    def x0(x_t, t, cond):
        return torch.sin(x_t + x_t[:, :, :1])

    denoiser = FirstFrameDenoiser(Denoiser(x0, process, Prediction.X0), FRAME)
    grid = torch.linspace(process.end, 0, 201, dtype=torch.float64)
    result = sampler(denoiser, process.prior_std * X_T, grid, None)
    exact = isinstance(process, FlowProcess | VarianceExploding)  # where a known x0 moves straight
    torch.testing.assert_close(result[:, :, :1], FRAME, rtol=0, atol=1e-12 if exact else 1e-3)


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_later_frames_see_the_clean_frame_at_every_noise_level(sampler):
    denoiser = FirstFrameDenoiser(copying(FlowProcess()), FRAME)
    grid = torch.linspace(1, 0, 6, dtype=torch.float64)
    result = sampler(denoiser, X_T, grid, None)
    torch.testing.assert_close(result, FRAME.expand_as(X_T), rtol=0, atol=1e-12)
    unaware = sampler(copying(FlowProcess()), X_T, grid, None)  # the same without the wrapper
    assert (unaware - FRAME).abs().max() > 0.1


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_data_and_velocity_tell_the_same(process):
    network = Denoiser(lambda x_t, t, c: x_t.sin(), process, Prediction.V)
    denoiser, t = FirstFrameDenoiser(network, FRAME), torch.tensor([0.3, 0.8]).double()
    velocity = denoiser.velocity(X_T, t, None)
    x0 = convert(velocity, X_T, t, process, Prediction.VELOCITY, Prediction.X0)
    torch.testing.assert_close(x0, denoiser.denoise(X_T, t, None), rtol=0, atol=1e-11)


def test_a_frame_of_another_shape_is_refused_with_both():
    with pytest.raises(ValueError, match=r"first frame of \(2, 3, 1, 4, 4\), got \(2, 3, 4, 4\)"):
        put_first_frame(X_T, FRAME[:, :, 0])


def test_guidance_goes_inside():
    denoiser, states = copying(FlowProcess()), X_T[:, :2, :, :1, :1]
    frame, cond = FRAME[:, :2, :, :1, :1], caption(0.7, batch=2)
    outside = ClassifierFreeGuidance(FirstFrameDenoiser(denoiser, frame), 3.0, caption(0.0))
    with pytest.raises(UserError, match=r"2 first frames for a batch of 4: .* around it"):
        outside.denoise(states, 0.5, cond)
    inside = FirstFrameDenoiser(ClassifierFreeGuidance(denoiser, 3.0, caption(0.0)), frame)
    assert torch.equal(inside.denoise(states, 0.5, cond)[:, :, :1], frame)
