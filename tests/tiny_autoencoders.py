"""Small autoencoders of videos, of random weights, one of each class of diffusers."""

from collections.abc import Callable

import diffusers
import torch

FOUR = (8, 8, 8, 8)


def wan(**changes: object) -> torch.nn.Module:
    """Of Wan 2.1's kind."""
    options = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True, True],
        "latents_mean": [0.1, 0.2, 0.3, 0.4],
        "latents_std": [1.0, 1.0, 1.0, 2.0],
    }
    return diffusers.AutoencoderKLWan(**(options | changes))


def wan_of_patches() -> torch.nn.Module:
    """Of Wan 2.2's kind."""
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12}
    return wan(is_residual=True, decoder_base_dim=8, scale_factor_spatial=8, **patches)


def qwen_image() -> torch.nn.Module:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.0, 1.0, 2.0],
    )


def mochi() -> torch.nn.Module:
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        latent_channels=4,
        layers_per_block=(1,) * 5,
    )


def cogvideox() -> torch.nn.Module:
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=FOUR,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )


def cosmos() -> torch.nn.Module:
    """With its own statistics, of 16 channels and every frame."""
    return diffusers.AutoencoderKLCosmos(
        encoder_block_out_channels=FOUR,
        decode_block_out_channels=FOUR,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
    )


def hunyuan_video() -> torch.nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=4
    )


def hunyuan_video_15() -> torch.nn.Module:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1
    )


def hunyuan_image_refiner() -> torch.nn.Module:
    """It takes videos, and leaves time as it is."""
    return diffusers.AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(16,) * 5, layers_per_block=1
    )


def ltx(**changes: object) -> torch.nn.Module:
    """With statistics of its own, in buffers."""
    module = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=FOUR,
        decoder_block_out_channels=FOUR,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        **changes,
    )
    module.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    module.latents_std.copy_(torch.linspace(0.5, 2, 8))
    return module


def ltx_of_a_time() -> torch.nn.Module:
    """Whose decoder is told how noisy the latents are, as from version 0.9.1 on."""
    return ltx(timestep_conditioning=True)


def ltx_2() -> torch.nn.Module:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(16, 32, 64),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
    )


def magvit() -> torch.nn.Module:
    return diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=FOUR, layers_per_block=1, norm_num_groups=4
    )


def kvae() -> torch.nn.Module:
    return diffusers.AutoencoderKLKVAEVideo(
        ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4
    )


# With pixels per latent along a side, and frames per frame of latents.
OF_VIDEOS: list[tuple[Callable[[], torch.nn.Module], int, int]] = [
    (wan, 4, 4),
    (wan_of_patches, 8, 4),
    (qwen_image, 8, 4),
    (mochi, 8, 6),
    (cogvideox, 8, 4),
    (cosmos, 8, 8),
    (hunyuan_video, 8, 4),
    (hunyuan_video_15, 16, 4),
    (hunyuan_image_refiner, 16, 1),
    (ltx, 32, 8),
    (ltx_of_a_time, 32, 8),
    (ltx_2, 32, 8),
    (magvit, 8, 4),
    (kvae, 8, 4),
]


def allegro() -> torch.nn.Module:
    """Which encodes nothing but in tiles of its own, of 24 frames."""
    return diffusers.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True),
        layers_per_block=1,
        norm_num_groups=4,
    )


def minimax() -> torch.nn.Module:
    """Which encodes clips of 17 frames, and drops a part of each."""
    return diffusers.AutoencoderKLMiniMaxH3(
        latent_channels=4,
        block_out_channels=(8,) * 6,
        layers_per_block=1,
        norm_num_groups=4,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_attention_head_dim=16,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )


def vidtok() -> torch.nn.Module:
    """Which takes as many frames again before the first."""
    return diffusers.AutoencoderVidTok(ch=32, ch_mult=[1, 1, 1, 1], z_channels=4, num_res_blocks=1)


def qwen_image_21() -> torch.nn.Module:
    """Of pictures with a channel of transparency, and of no videos."""
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def oobleck() -> torch.nn.Module:
    """Of sound."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
    )


REFUSED = [allegro, minimax, vidtok, qwen_image_21, oobleck]
