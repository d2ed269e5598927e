"""Tiles against the whole picture."""

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch.nn.functional import avg_pool2d

from ldm_core.autoencoders.autoencoder import DiffusersAutoencoder, IdentityAutoencoder, Posterior
from ldm_core.autoencoders.tiling import TiledAutoencoder, encode_tiled, tile_starts
from ldm_core.errors import UserError

GENERATOR = torch.Generator().manual_seed(0)
PICTURES = torch.rand(2, 3, 128, 192, generator=GENERATOR) * 2 - 1


def halved(pixels: torch.Tensor) -> Posterior:
    """An encoder that looks at nothing but a latent's own pixels."""
    mean = avg_pool2d(pixels, 2)
    return Posterior(mean, mean - 3)


@pytest.mark.parametrize(("length", "side"), [(8, 8), (9, 8), (14, 8), (15, 8), (100, 12), (7, 8)])
def test_tiles_cover_everything_and_overlap_by_a_quarter(length, side):
    starts = tile_starts(length, side)
    assert (starts[0], starts[-1]) == (0, max(0, length - side))
    gaps = [after - before for before, after in pairwise(starts)]
    assert all(0 < gap <= side - side // 4 for gap in gaps)


@pytest.mark.parametrize("tile", [16, 48, 64, 120])
def test_an_encoder_without_a_neighbourhood_gives_the_same(tile):
    whole, tiled = halved(PICTURES), encode_tiled(halved, PICTURES, tile, 2)
    torch.testing.assert_close(tiled.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tiled.logvar, whole.logvar, rtol=1e-6, atol=1e-6)


def test_what_lies_deep_in_a_tile_is_the_tiles_own():
    seen = []

    def numbered(pixels: torch.Tensor) -> Posterior:
        seen.append(pixels.shape)
        ones = torch.ones_like(pixels[:, :1, ::2, ::2])
        return Posterior(len(seen) * ones, 0 * ones)

    pictures = PICTURES[..., :112, :160]  # of 2 x 3 tiles, each sharing a quarter with the next
    mean = encode_tiled(numbered, pictures, 64, 2).mean[0, 0]
    assert set(seen) == {(2, 3, 64, 64)}  # all of full size
    assert (len(seen), mean.shape) == (2 * 3, (56, 80))
    rows, columns = tile_starts(56, 32), tile_starts(80, 32)
    middles = [mean[top + 16, left + 16] for top in rows for left in columns]
    assert middles == [float(k + 1) for k in range(len(seen))]
    crossing = mean[16, : columns[1] + 16]
    assert torch.all(crossing.diff() >= 0)  # blended, not cut
    assert crossing.diff().max() < 0.2


def tiled(module: torch.nn.Module, tile: int) -> tuple[DiffusersAutoencoder, TiledAutoencoder]:
    whole = DiffusersAutoencoder(module, "digest", "cpu")
    return whole, TiledAutoencoder(whole, tile)


def away_from_seams(size: int, tile: int, margin: int) -> torch.Tensor:
    """(size,) latents whose neighbourhood lies in one tile alone."""
    cuts = torch.zeros(size + 2 * margin, dtype=torch.bool)
    for start in tile_starts(size, tile):
        for edge in (start, start + tile):
            if 0 < edge < size:
                cuts[edge : edge + 2 * margin] = True
    return ~cuts[margin : margin + size]


def without_attention() -> AutoencoderKL:
    """Its normalisation has one group for each channel, which a tile of noise knows well."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )


def test_a_picture_is_what_it_is_whole_but_for_seams():
    whole, tiles = tiled(without_attention(), 96)
    expected, found = whole.encode(PICTURES), tiles.encode(PICTURES)
    assert found.mean.shape == expected.mean.shape
    spread = expected.mean.std()
    error = (found.mean - expected.mean).abs() / spread
    inner = torch.outer(away_from_seams(64, 48, 12), away_from_seams(96, 48, 12))
    assert inner.float().mean() > 0.05
    assert error[..., inner].mean() < 0.02
    assert error.mean() < 0.05
    assert (found.logvar - expected.logvar).abs().mean() < 0.05 * expected.logvar.std() + 0.05


def test_frames_of_a_video_are_tiled_alike():
    torch.manual_seed(0)
    wan = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[],
        temperal_downsample=[True, True],
    )  # fmt: skip
    whole, tiles = tiled(wan, 48)
    video = torch.rand(1, 3, 5, 64, 80, generator=GENERATOR) * 2 - 1
    expected, found = whole.encode(video), tiles.encode(video)
    assert found.mean.shape == expected.mean.shape == (1, 4, 2, 16, 20)
    error = (found.mean - expected.mean).abs() / expected.mean.std()
    assert error.mean() < 0.1
    moved = video.clone()
    moved[:, :, 1:] += 0.5
    assert torch.equal(tiles.encode(moved).mean[:, :, 0], found.mean[:, :, 0])  # still causal


def test_small_ones_are_left_alone_and_the_rest_is_the_others():
    whole, tiles = tiled(without_attention(), 192)
    assert torch.equal(tiles.encode(PICTURES).mean, whole.encode(PICTURES).mean)
    latents = torch.zeros(1, 4, 8, 8)
    assert torch.equal(tiles.decode(latents), whole.decode(latents))
    for name in ("digest", "downsampling", "temporal_downsampling", "channels", "latents_mean"):
        assert getattr(tiles, name) == getattr(whole, name)


def test_tiles_that_do_not_fit_the_latents_are_refused():
    TiledAutoencoder(IdentityAutoencoder(), 100)
    with pytest.raises(UserError, match=r"encode\.tile is 100, no multiple of 8 .* try 96"):
        tiled(without_attention(), 100)
