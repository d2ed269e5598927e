from itertools import pairwise

import pytest
import torch
from analytic import caption

from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction, convert
from ldm_core.diffusion.process import FlowProcess, half_log_snr, over_dimensions
from ldm_core.diffusion.variance_exploding import VarianceExploding
from ldm_core.diffusion.variance_preserving import VPSDE, DiscreteVP, TrigFlow, linear_betas
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance, NullPair
from ldm_core.samplers.cfg_pp import sample_cfg_pp
from ldm_core.samplers.euler import sample_euler

PROCESSES = [FlowProcess(), TrigFlow(), VPSDE(), DiscreteVP(linear_betas()), VarianceExploding()]
each_process = pytest.mark.parametrize(
    "process", PROCESSES, ids=[type(process).__name__ for process in PROCESSES]
)
COND, NULL = caption(0.7, batch=3), caption(-0.2, 1.0)


def gaussian(process, passes=None):
    def network(x_t, t, cond):
        if passes is not None:
            passes.append(len(x_t))
        m, s = (over_dimensions(part, x_t) for part in cond.pooled.unbind(-1))
        t = over_dimensions(t, x_t)
        alpha, sigma = process.alpha(t), process.sigma(t)
        return m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (x_t - alpha * m)

    return Denoiser(network, process, Prediction.X0)


def states(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, dtype=torch.float64, generator=draw)


def times(process, *half_log_snrs):
    return process.time_of(torch.tensor(half_log_snrs, dtype=torch.float64))


def ddim(denoiser, x, grid, cond):
    """x_r = alpha_r x0 + sigma_r eps (Song et al. 2021, Eq. 12 without noise)."""
    process = denoiser.process
    for t, r in pairwise(grid):
        x0 = denoiser.denoise(x, t, cond)
        eps = convert(x0, x, t, process, Prediction.X0, Prediction.EPS)
        x = process.alpha(r) * x0 + process.sigma(r) * eps
    return x


@each_process
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_equal_estimates_are_ddim(process, scale):
    denoiser = gaussian(process)
    grid = times(process, -2.0, -0.7, 0.3, 2.0)
    result = sample_cfg_pp(NullPair(denoiser, caption(0.7)), states(), grid, COND, scale)
    expected = ddim(denoiser, states(), grid, COND)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-13)


def test_equal_estimates_are_euler_on_a_flow():
    denoiser, grid = gaussian(FlowProcess()), linear_grid(7, dtype=torch.float64)
    result = sample_cfg_pp(NullPair(denoiser, caption(0.7)), states(), grid, COND, 0.6)
    expected = sample_euler(denoiser, states(), grid, COND)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)


@each_process
def test_a_step_is_ddim_under_a_larger_scale(process):
    """w / (1 - exp(lambda_t - lambda_r)), and the mutation: w itself, as in DDIM with guidance."""
    t, r = grid = times(process, -0.5, 0.4)
    result = sample_cfg_pp(NullPair(gaussian(process), NULL), states(), grid, COND, 0.6)
    larger = 0.6 / float(1 - (half_log_snr(process, t) - half_log_snr(process, r)).exp())
    guided = ClassifierFreeGuidance(gaussian(process), larger, NULL)
    torch.testing.assert_close(result, ddim(guided, states(), grid, COND), rtol=1e-12, atol=1e-12)
    same = ClassifierFreeGuidance(gaussian(process), 0.6, NULL)
    assert (result - ddim(same, states(), grid, COND)).abs().max() > 1e-2


def test_the_last_step_guides_the_data_by_w():
    grid = torch.tensor([0.5, 0.0], dtype=torch.float64)
    result = sample_cfg_pp(NullPair(gaussian(FlowProcess()), NULL), states(), grid, COND, 0.6)
    guided = ClassifierFreeGuidance(gaussian(FlowProcess()), 0.6, NULL)
    expected = guided.denoise(states(), grid[0], COND)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-15)


def test_one_batch_a_step_and_a_scale_a_sample():
    passes, events = [], []
    grid = linear_grid(4, dtype=torch.float64)
    pair = NullPair(gaussian(FlowProcess(), passes), NULL)
    scales = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    result = sample_cfg_pp(pair, states(), grid, COND, scales, events.append)
    assert passes == [6] * 4
    assert torch.equal(torch.stack([event.t for event in events]), grid[:-1])
    assert torch.equal(events[-1].x0, result)
    for index, scale in enumerate(scales.tolist()):
        alone = sample_cfg_pp(pair, states(), grid, COND, scale)
        torch.testing.assert_close(result[index], alone[index], rtol=0, atol=1e-14)


def test_a_grid_that_rises():
    with pytest.raises(ValueError, match="decreases from noise to data"):
        sample_cfg_pp(
            NullPair(gaussian(FlowProcess()), NULL), states(), torch.tensor([0.0, 1.0]), COND, 0.5
        )


@pytest.mark.parametrize("scale", [7.5, -0.1, torch.tensor([0.5, 7.5, 0.5]), float("nan")])
def test_a_scale_of_other_guidance_is_refused(scale):
    pair, grid = NullPair(gaussian(FlowProcess()), NULL), linear_grid(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got (7\.5|-0\.1|nan)"):
        sample_cfg_pp(pair, states(), grid, COND, scale)
