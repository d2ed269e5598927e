import pytest
import torch
from analytic import caption
from gaussians import each_process, gaussian, growth, moments, some_states, some_times

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import TrigFlow
from ldm_core.guidance.autoguidance import WeakPair
from ldm_core.guidance.guided import Guided


def weak(process, s=0.6, passes=None):
    """A model of N(m, S_bad^2), whatever the caption says of S."""
    strong = gaussian(process, passes=passes)
    return Denoiser(
        lambda x, t, cond: strong.network(x, t, caption(float(cond.pooled[0, 0]), s, len(x))),
        process,
        Prediction.VELOCITY,
    )


def test_the_std_shrinks_by_the_formula():
    ve = VarianceExploding(80.0)
    guided = Guided(WeakPair(gaussian(ve), weak(ve)), 2.0)
    _, std = moments(guided, caption(0.0, 0.4), 80.0, 0.0, start=80.0)
    formula = 80 * growth(ve, 0.4, 80.0, 0.0) ** 2 / growth(ve, 0.6, 80.0, 0.0)
    assert std == pytest.approx(formula, rel=1e-9)
    assert std == pytest.approx(0.4**2 / 0.6, rel=1e-4)  # S_good^w S_bad^(1 - w), below 0.4
    worse = Guided(WeakPair(weak(ve), gaussian(ve)), 2.0)  # the mutation: pair the wrong way round
    assert moments(worse, caption(0.0, 0.4), 80.0, 0.0, start=80.0)[1] > 0.8


@pytest.mark.parametrize("process", **each_process)
def test_the_mean_stays(process):
    guided = Guided(WeakPair(gaussian(process), weak(process)), 3.0)
    t = some_times(process, 3)
    x_t = 0.7 * process.alpha(t).reshape(3, 1, 1, 1).expand(3, 2, 4, 4)
    x0 = guided.denoise(x_t, t, caption(0.7, 0.4, 3))
    torch.testing.assert_close(x0, torch.full_like(x0, 0.7))


@pytest.mark.parametrize(("scale", "t", "each"), [(2.0, 0.5, 1), (1.0, 0.5, 0), (2.0, 0.9, 0)])
def test_a_pass_of_each_and_only_where_guided(scale, t, each):
    strong, bad = [], []
    pair = WeakPair(gaussian(FlowProcess(), passes=strong), weak(FlowProcess(), passes=bad))
    guided = Guided(pair, scale, interval=(0.2, 0.8))
    x_t = torch.randn(3, 2, dtype=torch.float64)
    result = guided.denoise(x_t, t, caption(0.7, batch=3))
    assert (strong, bad) == ([3], [3] * each)
    if not each:
        assert torch.equal(result, pair.good.denoise(x_t, t, caption(0.7, batch=3)))


def test_diffusers_agrees():
    guiders = pytest.importorskip("diffusers.guiders")
    theirs = guiders.AutoGuidance(2.5, auto_guidance_layers=[0], dropout=1.0)
    process = FlowProcess()
    t = some_times(process, 3)
    x_t, cond = some_states(process, t), caption(0.7, batch=3)
    theirs.set_state(0, 1, t)
    v = gaussian(process).velocity(x_t, t, cond), weak(process).velocity(x_t, t, cond)
    ours = Guided(WeakPair(gaussian(process), weak(process)), 2.5).velocity(x_t, t, cond)
    torch.testing.assert_close(ours, theirs.forward(*v).pred, rtol=0, atol=1e-13)


def test_models_of_different_processes():
    with pytest.raises(ValueError, match=r"\(0.5, 0.5\).*same process"):
        WeakPair(gaussian(FlowProcess()), gaussian(TrigFlow()))


def test_one_process_with_two_ends_is_two():
    ends = VarianceExploding(80.0), VarianceExploding(10.0)
    with pytest.raises(ValueError, match=r"ends at t = 80 .* at 10: .*same process"):
        WeakPair(*map(gaussian, ends))
