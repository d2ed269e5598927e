import pytest
import torch
from analytic import caption
from gaussians import captions, each_process, gaussian, some_states, some_times

from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_preserving import VPSDE
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.guidance.rescale import Rescaled

COND, NULL = captions([0.7, 0.1, -0.4]), caption(-0.2, 1.0)
SAMPLE = (1, 2, 3)


def guided(process, scale=5.0, passes=None):
    return ClassifierFreeGuidance(gaussian(process, passes=passes), scale, NULL)


@pytest.mark.parametrize("process", **each_process)
def test_the_spread_becomes_the_conditional_one(process):
    t = some_times(process, 3)
    x_t = some_states(process, t)
    plain = gaussian(process).velocity(x_t, t, COND)
    whole = Rescaled(guided(process), 1.0).velocity(x_t, t, COND)
    torch.testing.assert_close(whole.std(dim=SAMPLE), plain.std(dim=SAMPLE))
    none = Rescaled(guided(process), 0.0).velocity(x_t, t, COND)
    torch.testing.assert_close(none, guided(process).velocity(x_t, t, COND))
    some = Rescaled(guided(process), 0.7).velocity(x_t, t, COND)
    torch.testing.assert_close(some, 0.7 * whole + 0.3 * none)
    x0 = Rescaled(guided(process), 0.7).denoise(x_t, t, COND)
    meant = convert(some, x_t, t, process, Prediction.VELOCITY, Prediction.X0)
    torch.testing.assert_close(x0, meant)


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_one_batch_does(scale):
    passes = []
    t = some_times(FlowProcess(), 3)
    x_t = some_states(FlowProcess(), t)
    rescaled = Rescaled(guided(FlowProcess(), scale, passes), 0.7)
    result = rescaled.velocity(x_t, t, COND)
    assert passes == ([3] if scale == 1 else [6])
    if scale == 1:
        assert torch.equal(result, gaussian(FlowProcess()).velocity(x_t, t, COND))


def differs_from_diffusers(process, space):
    """What diffusers makes of predictions in `space`, against ours as that prediction."""
    guiders = pytest.importorskip("diffusers.guiders")
    t = some_times(process, 3)
    x_t = some_states(process, t)
    theirs = guiders.ClassifierFreeGuidance(5.0, guidance_rescale=0.7)
    theirs.set_state(0, 1, t)
    network = gaussian(process, space).network
    pred = theirs.forward(network(x_t, t, COND), network(x_t, t, NULL.expand(3))).pred
    ours = Rescaled(guided(process), 0.7).velocity(x_t, t, COND)
    ours = convert(ours, x_t, t, process, Prediction.VELOCITY, space)
    return float((ours - pred).abs().max())


def test_diffusers_agrees_on_velocities():
    assert differs_from_diffusers(FlowProcess(), Prediction.VELOCITY) < 1e-12


def test_on_the_circle_it_is_that_of_v_prediction():
    assert differs_from_diffusers(VPSDE(), Prediction.V) < 1e-12


@pytest.mark.parametrize("space", [Prediction.X0, Prediction.EPS])
def test_the_wrong_space_is_noticed(space):
    assert differs_from_diffusers(FlowProcess(), space) > 1e-2
