"""The classes of diffusers that encode pictures, beside those of `test_autoencoder.py`."""

import diffusers
import pytest
import torch

from ldm_core.autoencoders.autoencoder import autoencoder_facts, load_autoencoder
from ldm_core.errors import UserError

PIXELS = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2


def asymmetric() -> torch.nn.Module:
    return diffusers.AsymmetricAutoencoderKL(
        down_block_types=DOWN,
        down_block_out_channels=(8, 16),
        up_block_types=UP,
        up_block_out_channels=(8, 16),
        norm_num_groups=4,
    )


def flux_2() -> torch.nn.Module:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=DOWN,
        up_block_types=UP,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )


def hunyuan_image() -> torch.nn.Module:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=32,
    )


def kvae() -> torch.nn.Module:
    return diffusers.AutoencoderKLKVAE(
        channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1)
    )


def temporal_decoder() -> torch.nn.Module:
    """Of Stable Video Diffusion: its encoder takes pictures."""
    return diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=DOWN, block_out_channels=(32, 32)
    )


@pytest.mark.parametrize("new", [asymmetric, flux_2, hunyuan_image, kvae, temporal_decoder])
def test_a_picture_is_what_diffusers_makes_of_it(new, tmp_path):
    torch.manual_seed(0)
    module = new().eval()
    module.save_pretrained(tmp_path)
    ours = load_autoencoder(str(tmp_path))
    alone = {"num_frames": 1} if new is temporal_decoder else {}
    with torch.no_grad():
        expected = module.encode(PIXELS).latent_dist
        decoded = module.decode(expected.mean, **alone).sample.clamp(-1, 1)
    posterior = ours.encode(PIXELS)
    assert torch.equal(posterior.mean, expected.mean)
    assert torch.equal(posterior.logvar, expected.logvar)
    assert torch.equal(ours.decode(posterior.mean), decoded)
    assert (ours.downsampling, ours.temporal_downsampling) == (2, None)


def test_a_downsampling_of_128(tmp_path):
    diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_out_channels=(8,) * 8,
        decoder_block_out_channels=(8,) * 8,
        encoder_layers_per_block=(1,) * 8,
        decoder_layers_per_block=(1,) * 8,
        encoder_qkv_multiscales=((),) * 8,
        decoder_qkv_multiscales=((),) * 8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
    ).save_pretrained(tmp_path)
    assert autoencoder_facts(str(tmp_path)).downsampling == 128


def test_one_of_squares_alone_is_refused(tmp_path):
    """It makes as many latents of every picture, whatever its shape."""
    diffusers.AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        encoder_patch_size=8,
        encoder_input_size=16,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        patch_size=8,
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="AutoencoderRAE made 2 x 2 latents of .*: take one of pic"):
        load_autoencoder(str(tmp_path))
