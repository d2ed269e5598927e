import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from ldm_core.autoencoders.autoencoder import Posterior
from ldm_core.autoencoders.losses import (
    CHROMA_GAIN,
    autoencoder_loss,
    gradient_pyramid,
    kl_to_standard_normal,
    opponent_colours,
)
from ldm_core.autoencoders.training import latent_statistics, new_autoencoder, psnr

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def picture(size: int = 32) -> torch.Tensor:
    """A disc with a sharp edge on a dark ground, (1, 3, size, size)."""
    place = torch.arange(size) - (size - 1) / 2
    disc = (place[:, None] ** 2 + place**2 < (size / 3) ** 2).double()
    return torch.stack([disc - 0.5, 0.2 - disc / 2, -disc / 3])[None]


def blurred(pixels: torch.Tensor) -> torch.Tensor:
    kernel = torch.ones(3, 1, 5, 5, dtype=pixels.dtype) / 25
    return F.conv2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def test_kl_against_torch_distributions():
    mean, logvar = normal(5, 4, 3, 3), normal(5, 4, 3, 3)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
    actual = kl_to_standard_normal(Posterior(mean, logvar))
    torch.testing.assert_close(actual, expected.sum(dim=(1, 2, 3)))


def test_opponent_axes_are_orthogonal_and_chroma_counts_double():
    basis = torch.eye(3, dtype=torch.float64)[..., None, None]  # a batch of three one-pixel colours
    axes = opponent_colours(basis)[..., 0, 0].T
    gains = torch.tensor([1.0, CHROMA_GAIN, CHROMA_GAIN], dtype=torch.float64)
    torch.testing.assert_close(axes @ axes.T, torch.diag(gains**2))
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert opponent_colours(grey)[:, 1:].abs().max() < 1e-7


def test_gradient_pyramid_sees_edges_and_no_offsets():
    constant = normal(4, 3, 1, 1).expand(4, 3, 16, 16)
    assert torch.equal(gradient_pyramid(torch.zeros(4, 3, 16, 16)), torch.zeros(4))
    assert torch.equal(gradient_pyramid(constant), torch.zeros(4, dtype=torch.float64))
    # A ramp of slope s along x: pooling halves the pixels, so the difference doubles per level.
    ramp = 0.1 * torch.arange(16, dtype=torch.float64).expand(1, 3, 16, 16)
    expected = torch.tensor([0.1 * (1 + 2 + 4) / 3], dtype=torch.float64)
    torch.testing.assert_close(gradient_pyramid(ramp), expected)
    torch.testing.assert_close(gradient_pyramid(ramp.mT), expected)


def test_blur_costs_more_than_an_offset_of_the_same_l2():
    pixels = picture()
    blur = blurred(pixels) - pixels
    offset = torch.full_like(blur, float(blur.square().mean().sqrt()))
    posterior = Posterior(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    of_blur, of_offset = (
        autoencoder_loss(pixels, pixels + error, posterior, 1.0, 1.0) for error in (blur, offset)
    )
    assert of_offset.perceptual.abs().max() < 1e-12
    assert of_blur.perceptual > 0.05


def test_the_total_is_the_weighted_sum():
    pixels, error = picture(), 0.1 * normal(1, 3, 32, 32)
    posterior = Posterior(normal(1, 4, 8, 8), normal(1, 4, 8, 8))
    loss = autoencoder_loss(pixels, pixels + error, posterior, 1e-3, 0.3)
    torch.testing.assert_close(
        loss.total, loss.reconstruction + 0.3 * loss.perceptual + 1e-3 * loss.kl
    )
    exact = autoencoder_loss(pixels, pixels, posterior, 1e-3, 0.3)
    assert exact.total == 1e-3 * exact.kl


def test_latent_statistics_are_those_of_draws():
    shape = (64, 3, 16, 16)
    scale = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)[:, None, None]
    posterior = Posterior(scale * (normal(*shape) + 1), normal(*shape) - 1)
    draws = torch.cat([posterior.sample(normal(*shape)) for _ in range(8)])
    mean, std = latent_statistics(posterior)
    assert mean == pytest.approx(draws.mean(dim=(0, 2, 3)).tolist(), abs=0.02)
    assert std == pytest.approx(draws.std(dim=(0, 2, 3)).tolist(), rel=0.01)


def test_psnr_of_a_known_error():
    pixels = torch.zeros(3, 3, 8, 8)
    error = torch.tensor([0.2, 0.02, 0.5])[:, None, None, None]
    expected = 20 * torch.log10(2 / error.flatten())
    torch.testing.assert_close(psnr(pixels, pixels + error), expected)
    assert psnr(pixels + 1, pixels + 1.7).isinf().all()  # what is shown is clamped


def test_a_new_autoencoder_is_a_function_of_its_seed():
    state = torch.get_rng_state()
    first, same, other = (
        new_autoencoder((8, 16), 4, 1, 32, seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_autoencoder_starts_with_little_noise():
    network = new_autoencoder((8, 16), 4, 1, 32, 0)
    pixels = torch.rand(4, 3, 32, 32, generator=GENERATOR) * 2 - 1
    with torch.no_grad():
        posterior = network.encode(pixels).latent_dist
    assert posterior.mean.shape == (4, 4, 16, 16)
    assert posterior.logvar.mean().item() == pytest.approx(-6.0, abs=0.5)
