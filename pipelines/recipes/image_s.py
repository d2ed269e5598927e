"""64-pixel pictures of shapes on two CPU cores: the demo, and a toy of it for tests."""

from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import (
    AutoencoderSection,
    DistillSection,
    EncodeSection,
    EvaluateSection,
    TextSection,
    TrainSection,
)


def image_s() -> Recipe:
    """The demo: from nothing to a 4-step model on two cores."""
    return Recipe(
        name="image-s",
        data="demo/data",
        root="demo",
        precision="fp32",  # so narrow a network gains nothing by less, even where AMX has it
        autoencoder=AutoencoderSection(
            channels=3,
            block_channels=(16, 32, 64),
            batch_size=8,
            steps=640,
            learning_rate=4e-3,
            kl_weight=2e-6,
            halved_share=0.4,
            checkpoint_every=160,
        ),
        # the rounding with which the README's figures were made
        encode=EncodeSection(upscale=True, channels_last=False),
        train=TrainSection(
            width=96,
            depth=4,
            heads=4,
            steps=1900,
            batch_size=32,
            learning_rate=8e-3,
            decay_fraction=0.6,
            timestep_std=0.8,
            timestep_shift=3,
            micro_batches=2,
            ema_decay=0.99,
            sample_every=950,
            checkpoint_every=475,
        ),
        distill=DistillSection(
            batch_size=24,
            guidance_steps=30,
            steps=100,
            learning_rate=1.5e-3,
            checkpoint_every=25,
        ),
        evaluate=EvaluateSection(double_prompts=64),
    )


def image_tiny() -> Recipe:
    """Every stage in seconds, for tests and first tries; its pictures are not worth looking at."""
    return Recipe(
        name="image-tiny",
        data="demo/data",
        root="demo/tiny",
        size=32,
        autoencoder=AutoencoderSection(
            block_channels=(8, 8, 16), batch_size=8, steps=6, halved_share=0.5, checkpoint_every=3
        ),
        text=TextSection(tiny_width=16),
        encode=EncodeSection(upscale=True, shard_size=16, batch_size=8),
        train=TrainSection(
            width=32,
            depth=2,
            heads=2,
            steps=8,
            batch_size=8,
            micro_batches=4,
            warmup_steps=2,
            log_every=2,
            sample_every=4,
            sample_steps=4,
            checkpoint_every=4,
        ),
        distill=DistillSection(
            steps=4,
            guidance_steps=2,
            batch_size=8,
            teacher_substeps=2,
            log_every=1,
            checkpoint_every=2,
        ),
        evaluate=EvaluateSection(single_prompts=8, double_prompts=4, teacher_steps=4, batch_size=8),
    )
