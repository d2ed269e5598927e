import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

from ldm_core.backbones.embeddings import (
    grid_rotary,
    patchify,
    place_waves,
    timestep_waves,
    unpatchify,
)
from ldm_core.backbones.layers import rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("closed", [False, True])
def test_timestep_waves_are_those_of_diffusers(closed):
    timestep = torch.tensor([0.0, 1.5, 999.0])
    theirs = get_timestep_embedding(timestep, 64, True, downscale_freq_shift=float(closed))
    assert torch.equal(timestep_waves(timestep, 32, closed), theirs)


def test_place_waves_are_those_of_diffusers():
    theirs = get_2d_sincos_pos_embed(24, 6, base_size=3, output_type="pt")
    places = torch.arange(6) * 0.5
    torch.testing.assert_close(place_waves(places, places, 24), theirs.float(), rtol=0, atol=1e-6)


def test_rotary_angles_are_those_of_flux_and_hunyuan_video():
    """Which repeat every angle for the two channels of a pair."""
    table = grid_rotary((3, 4, 2), (2, 4, 6), CPU, base=256.0, centred=False)
    theirs = HunyuanVideoRotaryPosEmbed(2, 1, [4, 8, 12], 256.0)(torch.zeros(1, 1, 3, 8, 4))
    for ours, other in zip(table, theirs, strict=True):
        torch.testing.assert_close(ours, other[:, ::2], rtol=0, atol=1e-6)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(2))
    table = grid_rotary((1, 4, 2), (2, 4, 6), CPU, base=10_000.0, centred=False)
    for ours, other in zip(table, FluxPosEmbed(10_000, [4, 8, 12])(places), strict=True):
        torch.testing.assert_close(ours, other[:, ::2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("centred", [False, True])
def test_logits_depend_on_the_offset_in_time_and_space_only(centred):
    grid, k = (3, 2, 4), 12
    table = grid_rotary(grid, (2, 2, 2), CPU, centred=centred)
    query, key = torch.randn(2, k)
    q, k_ = (rotate(x.expand(24, k), table) for x in (query, key))
    logits = (q @ k_.T).view(*grid, *grid)
    for axis in range(3):
        low, high = (logits.narrow(axis, at, grid[axis] - 1) for at in (0, 1))
        low, high = (x.narrow(axis + 3, at, grid[axis] - 1) for at, x in ((0, low), (1, high)))
        torch.testing.assert_close(low, high)
        assert not torch.allclose(logits.select(axis, 0), logits.select(axis, 1))


def test_patches_come_back():
    x = torch.randn(2, 3, 4, 6, 8)
    patches, grid = patchify(x, 2)
    assert patches.shape == (2, 4 * 3 * 4, 12)
    assert grid == (4, 3, 4)
    assert torch.equal(unpatchify(patches, grid, 2), x)
    assert torch.equal(patchify(x[:, :, 1], 2)[0], patches.unflatten(1, (4, 12))[:, 1])
    assert torch.equal(patches[0, 5].view(3, 2, 2), x[0, :, 0, 2:4, 2:4])  # row 1, column 1


def test_indivisible_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"8 x 7 .* 2 x 2"):
        patchify(torch.zeros(1, 3, 8, 7), 2)
