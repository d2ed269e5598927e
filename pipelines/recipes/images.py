"""Pictures at the sizes of published models, for clusters of GPUs: differences from the demo.

Their encoders are copies in a folder or bucket of yours; `--set` names others. Their channels,
downsampling and widths are what a plan expects before anything is encoded.
"""

from collections.abc import Mapping

from pipelines.recipes.base import Workers
from pipelines.recipes.layout_section import LayoutSection
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, TrainSection

SD_VAE = AutoencoderSection(source="models/sd-vae-ft-ema", downsampling=8, channels=4)
SD3_VAE = AutoencoderSection(source="models/sd3-vae", downsampling=8, channels=16)
FLUX_VAE = AutoencoderSection(source="models/flux-vae", downsampling=8, channels=16)
T5_XXL = TextSection(t5="models/t5-v1_1-xxl", clip="models/clip-vit-large-patch14", max_tokens=128)


def gpus(count: int) -> Workers:
    """Workers with a GPU each."""
    return Workers(count=count, cpus=8, gpus=1)


def image_b() -> Recipe:
    """256-pixel pictures, 148M parameters (DiT-B class) over 8x8 latents of 4 channels: 8 GPUs."""
    return Recipe(
        name="image-b",
        data="data/pictures",
        root="runs/image-b",
        size=256,
        model_name="image-b",
        autoencoder=SD_VAE,
        text=T5_XXL,
        encode=EncodeSection(workers=gpus(8), max_aspect=2.0),
        train=TrainSection(
            width=768,
            depth=12,
            heads=12,
            steps=400_000,
            batch_size=256,
            micro_batches=8,  # also on fewer workers
            learning_rate=4e-4,
            warmup_steps=2000,
            decay_fraction=0.2,
            ema_decay=0.9999,
            ema_lengths=(0.05, 0.10),
            spike_factor=5.0,
            validation_samples=64,
            validation_gpus=1,  # besides the workers': a CPU would fall behind
            validate_every=5000,
            sample_every=10_000,
            checkpoint_every=2000,
            compile=True,
            accelerator="H100-80",
            workers=gpus(8),
        ),
    )


def image_xl() -> Recipe:
    """256-pixel pictures, 712M parameters (DiT-XL class) over 8x8 latents of 4 channels: 8 GPUs."""
    base = image_b()
    train = {"width": 1152, "depth": 28, "heads": 16, "batch_size": 512, "learning_rate": 2e-4}
    return derived(base, "image-xl", train)


def mmdit_2b() -> Recipe:
    """512-pixel pictures, 2B parameters (SD3-medium class) over 8x8 latents of 16 channels."""
    train = {
        "backbone": "mmdit",
        "width": 1536,
        "depth": 24,
        "heads": 24,
        "text_depth": 2,
        "batch_size": 1024,
        "learning_rate": 1e-4,
        "micro_batches": 64,
        "workers": gpus(32),
        "layout": LayoutSection(shard=8),
    }
    text = T5_XXL.model_copy(update={"clip_width": 2048, "max_tokens": 256})
    return derived(image_b(), "mmdit-2b", train, size=512, autoencoder=SD3_VAE, text=text)


def flux_12b() -> Recipe:
    """1024-pixel pictures, 12B parameters (Flux class), 8x8 latents of 16 channels: 64 GPUs."""
    train = {
        "width": 3072,
        "depth": 19,
        "single_depth": 38,
        "batch_size": 256,
        "micro_batches": 64,
        "workers": gpus(64),
        "layout": LayoutSection(shard=32),
        "activation_checkpointing": "full",
    }
    text = T5_XXL.model_copy(update={"max_tokens": 512})
    return derived(mmdit_2b(), "flux-12b", train, size=1024, autoencoder=FLUX_VAE, text=text)


def derived(base: Recipe, name: str, train: Mapping[str, object], **others: object) -> Recipe:
    """A recipe under another name, with other fields of its train section; validated anew."""
    values = {field: getattr(base, field) for field in Recipe.model_fields}
    section = {field: getattr(base.train, field) for field in TrainSection.model_fields}
    places = {"name": name, "model_name": name, "root": f"runs/{name}"}
    return Recipe(**{**values, **places, **others, "train": TrainSection(**{**section, **train})})  # type: ignore[arg-type]
