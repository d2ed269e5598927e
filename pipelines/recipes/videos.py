"""Videos: a toy for two CPU cores, and the sizes of published models for clusters of GPUs.

The large ones expect a causal autoencoder that shrinks 8 x 8 pixels and 4 frames to a latent of 16
channels, as Wan's and HunyuanVideo's do; a clip has 1 more than a multiple of 4 frames.

Buckets are the largest boxes of a budget of pixels whose sides are multiples of 16 (`Geometry`), so
480p is 480x848, of nearest to 16:9, where the published models have 480x832 and 2 % fewer tokens.
"""

from pipelines.recipes.image_s import image_tiny
from pipelines.recipes.images import derived, gpus, image_b
from pipelines.recipes.layout_section import LayoutSection
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection

WAN_VAE = AutoencoderSection(
    source="models/wan-vae", downsampling=8, temporal_downsampling=4, channels=16
)
UMT5 = TextSection(t5="models/umt5-xxl", clip="models/clip-vit-large-patch14", max_tokens=512)


def video_s() -> Recipe:
    """Clips of 9 frames of 32 pixels, as they are, on two CPU cores: a toy."""
    base = image_tiny()
    train = {"buckets": ("32x32x9",), "width": 96, "depth": 4, "heads": 4, "patch_size": 4}
    longer = {"steps": 400, "checkpoint_every": 100, "sample_every": 200, "learning_rate": 4e-3}
    return derived(
        base,
        "video-s",
        {**train, **longer},
        data="demo/videos",
        root="demo/videos-run",
        autoencoder=AutoencoderSection(source="identity"),
        encode=base.encode.model_copy(update={"frames": 9}),
    )


def video_1b() -> Recipe:
    """480p clips of 5 s, 1.4B parameters (Wan-1.3B class): 33,390 tokens, 32 GPUs."""
    train = {
        "buckets": ("480x848x81", "480x848x1"),
        "width": 1792,
        "depth": 22,
        "heads": 14,
        "batch_size": 64,
        "micro_batches": 64,
        "learning_rate": 1e-4,
        "workers": gpus(32),
        "layout": LayoutSection(shard=8),
        "activation_checkpointing": "selective",
    }
    clips = EncodeSection(workers=gpus(32), max_aspect=2.0, fps=16.0, frames=81)
    own = {"autoencoder": WAN_VAE, "text": UMT5, "encode": clips, "data": "data/videos"}
    return derived(image_b(), "video-1b", train, size=640, **own)


def video_14b() -> Recipe:
    """480p clips of 6 s, 14B parameters (Wan-14B class): 38,160 tokens, 128 GPUs."""
    train = {
        "buckets": ("480x848x93", "480x848x1"),
        "width": 5120,
        "depth": 28,
        "heads": 40,
        "batch_size": 128,
        "micro_batches": 128,
        "workers": gpus(128),
        "layout": LayoutSection(shard=128),
        "activation_checkpointing": "full",
    }
    clips = EncodeSection(workers=gpus(64), max_aspect=2.0, fps=16.0, frames=93)
    return derived(video_1b(), "video-14b", train, encode=clips)


def video_30b() -> Recipe:
    """720p clips of 5 s, 30B parameters (Movie Gen class): 75,600 tokens, 512 GPUs."""
    train = {
        "buckets": ("720x1280x81", "720x1280x1"),
        "width": 6144,
        "depth": 43,
        "heads": 48,
        "batch_size": 256,
        "micro_batches": 256,
        "workers": gpus(512),
        "layout": LayoutSection(shard=256, context=2),
        # whoever validates has the weights in float32, 121 GB: more than one GPU of 80
        "validation_samples": 0,
        "validation_gpus": 0,
        "sample_every": 400_000,
    }
    clips = EncodeSection(workers=gpus(128), max_aspect=2.0, fps=16.0, frames=81)
    return derived(video_14b(), "video-30b", train, size=960, encode=clips)
