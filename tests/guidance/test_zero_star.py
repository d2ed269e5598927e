import pytest
import torch
from analytic import caption
from gaussians import PROCESSES, captions, each_process, gaussian, some_states, some_times

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, over_dimensions
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.guidance.zero_star import ZeroInit, ZeroStar
from ldm_core.samplers.euler import sample_euler

COND, NULL = captions([0.7, 0.1, -0.4]), caption(-0.2, 1.0)
GRID = linear_grid(5, dtype=torch.float64)


def proportional(process, factor):
    """A velocity network with v_c = factor v_u; its null caption has the mean -0.2."""

    def network(x_t, t, cond):
        v = (3 * x_t).cos() + 0.3
        return torch.where(over_dimensions(cond.pooled[:, 0] == -0.2, x_t), v, factor * v)

    return Denoiser(network, process, Prediction.VELOCITY)


def strays(process, scale, space):
    """How far the guided velocity is from v_c, when v_c = 1.7 v_u."""
    t = some_times(process, 3)
    x_t, rule = some_states(process, t), ZeroStar()
    rule.space = space
    denoiser = proportional(process, 1.7)
    guided = ClassifierFreeGuidance(denoiser, scale, NULL, rule=rule)
    v_c = denoiser.velocity(x_t, t, COND)
    return float((guided.velocity(x_t, t, COND) - v_c).abs().max())


@pytest.mark.parametrize("process", **each_process)
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_a_multiple_is_taken_back(process, scale):
    assert strays(process, scale, Prediction.VELOCITY) < 1e-12


def test_the_wrong_space_is_noticed():
    assert strays(FlowProcess(), 4.0, Prediction.X0) > 0.1


@pytest.mark.parametrize("process", **each_process)
def test_the_scale_leaves_a_residual_orthogonal_to_the_unconditional(process):
    t = some_times(process, 3)
    x_t = some_states(process, t)
    v_c = gaussian(process).velocity(x_t, t, COND)
    v_u = gaussian(process).velocity(x_t, t, NULL.expand(3))
    guided = ClassifierFreeGuidance(gaussian(process), 4.0, NULL, rule=ZeroStar())
    residual = (guided.velocity(x_t, t, COND) - v_c) / 3  # v_c - s* v_u
    dot, norm = (residual * v_u).sum(dim=(1, 2, 3)), v_u.square().sum(dim=(1, 2, 3))
    assert (dot / norm).abs().max() < 1e-12
    # and the x0 of it is the one that belongs to that velocity
    x0 = guided.denoise(x_t, t, COND)
    again = Denoiser(lambda *_: x0, process, Prediction.X0).velocity(x_t, t, COND)
    torch.testing.assert_close(again, guided.velocity(x_t, t, COND), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero_steps", [0, 1, 2])
def test_diffusers_agrees_on_velocities(zero_steps):
    guiders = pytest.importorskip("diffusers.guiders")
    theirs = guiders.ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=zero_steps)
    plain = gaussian(FlowProcess())
    guided = ClassifierFreeGuidance(plain, 4.0, NULL, rule=ZeroStar())
    ours = ZeroInit(guided, float(GRID[zero_steps - 1])) if zero_steps else guided
    x = some_states(FlowProcess(), torch.ones(3, dtype=torch.float64))
    for index, t in enumerate(GRID[:-1]):
        theirs.set_state(index, len(GRID) - 1, t)
        v_c, v_u = plain.velocity(x, t, COND), plain.velocity(x, t, NULL.expand(3))
        v = ours.velocity(x, t, COND)
        torch.testing.assert_close(v, theirs.forward(v_c, v_u).pred, rtol=1e-5, atol=1e-5)
        x = x - (t - GRID[index + 1]) * v


@pytest.mark.parametrize("steps", [1, 3])
def test_zero_init_skips_steps_and_passes(steps):
    passes = []
    denoiser = gaussian(FlowProcess(), passes=passes)
    x_T = some_states(FlowProcess(), torch.ones(3, dtype=torch.float64))
    result = sample_euler(ZeroInit(denoiser, float(GRID[steps - 1])), x_T, GRID, COND)
    assert passes == [3] * (5 - steps)
    assert torch.equal(result, sample_euler(denoiser, x_T, GRID[steps:], COND))


@pytest.mark.parametrize("process", PROCESSES[:2], ids=["flow", "trigflow"])
def test_zero_init_by_the_sample(process):
    t = some_times(process, 3)  # from noise to data
    x_t = some_states(process, t)
    denoiser = gaussian(process)
    still = ZeroInit(denoiser, float(t[1]))
    v, x0 = still.velocity(x_t, t, COND), still.denoise(x_t, t, COND)
    assert not v[:2].any()
    assert torch.equal(v[2], denoiser.velocity(x_t, t, COND)[2])
    assert torch.equal(x0[2], denoiser.denoise(x_t, t, COND)[2])
    if process is PROCESSES[0]:
        assert torch.equal(x0[:2], x_t[:2])
