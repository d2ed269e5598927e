"""What training on halved latents does: an effect measured, not a flag read back."""

import numpy as np
import pytest
import torch

from ldm_core.autoencoders.autoencoder import Posterior
from ldm_core.autoencoders.losses import autoencoder_loss
from ldm_core.autoencoders.training import Reconstruction, halved, new_autoencoder
from ldm_core.evaluation.prompts import evaluation_scenes
from ldm_core.media.pixels import to_pixels
from ldm_core.media.shapes import render_scene
from ldm_core.training.optimizers import hidden_kernels, muon_and_adamw, warmup_then_decay

STEPS = 150
PIXELS = torch.stack(
    [to_pixels(render_scene(scene, 16)) for scene in evaluation_scenes("single", 24, 0)]
)


def trained(share: float) -> Reconstruction:
    """An autoencoder after some steps, `share` of them on halved latents."""
    model = Reconstruction(new_autoencoder((8, 16), 3, 1, 16, seed=0))
    optimizers = muon_and_adamw(model, hidden_kernels(model), 1e-2)
    order = np.random.default_rng(0)
    for step in range(STEPS):
        pixels, halve = PIXELS[order.integers(0, 24, 8)], bool(order.random() < share)
        decoded, mean, logvar = model(pixels, torch.zeros(8, 3, 8, 8), halve)
        target = halved(pixels) if halve else pixels
        loss = autoencoder_loss(target, decoded, Posterior(mean, logvar), 1e-6, 0.1).total.mean()
        loss.backward()
        optimizers.step(warmup_then_decay(step, STEPS, 5, 0.4))
        optimizers.zero_grad()
    return model.eval()


@torch.no_grad()
def errors(model: Reconstruction) -> tuple[float, float]:
    """Mean squared errors: of pictures, and of halved pictures from halved latents."""
    noise = torch.zeros(24, 3, 8, 8)
    whole, halves = (model(PIXELS, noise, halve)[0] for halve in (False, True))
    assert whole.shape == PIXELS.shape
    assert halves.shape == (24, 3, 8, 8)
    return (
        float((whole - PIXELS).square().mean()),
        float((halves - halved(PIXELS)).square().mean()),
    )


@pytest.mark.slow
def test_halved_latents_decode_to_halved_pictures_once_trained_to():
    plain, equivariant = errors(trained(0.0)), errors(trained(0.5))
    assert plain[1] > 5 * plain[0]  # free to do otherwise, it does
    assert equivariant[1] < 0.5 * plain[1]
    assert equivariant[1] < 1.5 * equivariant[0]


def test_a_halved_image_is_the_mean_of_its_squares():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert halved(image).flatten().tolist() == pytest.approx([2.5, 4.5, 10.5, 12.5])
