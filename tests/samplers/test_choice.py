"""Samplers by name: each finds the data, noise is the picture's own, wrong words are told."""

import pytest
import torch
from analytic import MEAN, caption, gaussian_denoiser

from ldm_core.diffusion.grids import linear_grid
from ldm_core.errors import UserError
from ldm_core.samplers.choice import SAMPLERS, SamplerChoice

SEEDS = [3, 2**63 - 1, 5]
GRID = linear_grid(4).double()


def sample(name: str, seeds=SEEDS, eta=None, std=0.4) -> torch.Tensor:
    """Two numbers a picture, which start as functions of its seed."""
    rows = [torch.manual_seed(seed % 1000) and torch.randn(1, 2).double() for seed in seeds]
    cond = caption(MEAN, std, len(seeds))
    return SamplerChoice(name, eta).sample(gaussian_denoiser(), torch.cat(rows), GRID, cond, seeds)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_point_is_found(name):
    found = sample(name, std=1e-9)
    torch.testing.assert_close(found, torch.full_like(found, MEAN), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_company(name):
    together = sample(name)
    assert together.std() > 0.01
    for row, seed in zip(together[:2], SEEDS[:2], strict=True):
        torch.testing.assert_close(sample(name, [seed])[0], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "eta", "other"),
    [
        ("euler-ancestral", 0.0, "euler"),
        ("ddim", None, "euler"),
        ("ddim", 1.0, "ddpm"),
        ("ddim", 0.5, ("euler-ancestral", 0.5)),
        ("dpmpp-2m-sde", 0.0, "dpmpp-2m"),
        ("dpmpp-2s-ancestral", 0.0, "dpmpp-2s"),
    ],
)
def test_eta_reaches_from_one_sampler_to_another(name, eta, other):
    other = (other, None) if isinstance(other, str) else other
    torch.testing.assert_close(
        sample(name, eta=eta), sample(other[0], eta=other[1]), rtol=1e-10, atol=1e-10
    )


def test_more_eta_is_other_noise():
    assert (sample("ddim", eta=0.5) - sample("ddim", eta=0.6)).abs().max() > 0.01
    assert (sample("dpmpp-sde", eta=0.5) - sample("dpmpp-sde")).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "eta", "message"),
    [
        ("heun", 0.5, r"eta is 0\.5, but heun is an ODE solver: .* ddim, euler-ancestral"),
        ("er-sde", 1.0, r"eta is 1, but er-sde is a sampler with a noise of its own"),
        ("ddim", 1.5, r"eta is 1\.5; choose 0"),
        ("ddim", float("nan"), "eta is nan"),
        ("plms", None, r"sampler 'plms': choose one of euler, heun, "),
    ],
)
def test_what_cannot_be_chosen(name, eta, message):
    with pytest.raises(UserError, match=message):
        SamplerChoice(name, eta)
