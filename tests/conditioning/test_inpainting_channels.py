import re

import pytest
import torch
from small_dit import PATCH, SIZE, B, C, batch, opened, trained_dit

from ldm_core.conditioning.channels import ChannelConditioned, widen_linear
from ldm_core.conditioning.inpainting import inpainting_channels, latent_mask

X0 = torch.randn(B, C, SIZE, SIZE, dtype=torch.float64)


def some_mask():
    known = torch.zeros(B, 1, SIZE, SIZE)
    known[:, :, 2:5, 1:7] = 1
    return known


def test_what_is_known_then_where():
    channels = inpainting_channels(X0, some_mask())
    assert channels.shape == (B, C + 1, SIZE, SIZE)
    assert torch.equal(channels[:, :C, 2:5, 1:7], X0[:, :, 2:5, 1:7])
    assert torch.equal(channels[:, C:], some_mask().double())
    assert channels[:, :C].count_nonzero() == B * C * 3 * 6


def test_the_unknown_region_is_not_looked_at():
    nonsense = torch.where(some_mask() > 0, X0, torch.nan)
    assert torch.equal(
        inpainting_channels(nonsense, some_mask()), inpainting_channels(X0, some_mask())
    )


def test_nothing_known_is_the_absent_condition():
    assert inpainting_channels(X0, torch.zeros(B, 1, SIZE, SIZE)).count_nonzero() == 0


def test_a_trained_dit_starts_as_itself_then_listens():
    dit, (x_t, t, cond) = trained_dit(), batch()
    expected = dit(x_t, t, cond)
    dit.patch_embedding = widen_linear(dit.patch_embedding, (C + 1) * PATCH**2)
    network = ChannelConditioned(dit, {"inpainting": C + 1})
    masked = cond.with_extra("inpainting", inpainting_channels(X0, some_mask()))
    assert torch.equal(network(x_t, t, masked), expected)
    opened(network)
    other = cond.with_extra("inpainting", inpainting_channels(X0, 1 - some_mask()))
    assert (network(x_t, t, masked) - network(x_t, t, other)).abs().max() > 1e-3


def test_a_latent_is_known_if_all_its_pixels_are():
    known = torch.ones(1, 1, 16, 24)
    known[..., 3, 9] = 0
    known[..., 8:, :8] = 0
    assert latent_mask(known, 8).tolist() == [[[[1, 0, 1], [0, 1, 1]]]]
    with pytest.raises(ValueError, match=r"\(16, 24\) does not divide by 5"):
        latent_mask(known, 5)


@pytest.mark.parametrize("shape", [(B, C, SIZE, SIZE), (1, 1, SIZE, SIZE), (B, 1, SIZE, 4)])
def test_a_mask_of_another_shape_is_refused_with_both(shape):
    both = re.escape(f"has a mask of {(B, 1, SIZE, SIZE)}, got {shape}")
    with pytest.raises(ValueError, match=both):
        inpainting_channels(X0, torch.ones(shape))
