"""Model cards: the README.md of a model directory."""

from ldm_core.model_directory import ModelConfig
from pipelines.recipes.schema import Recipe

_CARD = """---
library_name: latent-diffusion-on-ray
pipeline_tag: text-to-image
---
# {title}

{what}

- pictures: {size} pixels; latents {latent}
- default: {steps} steps at guidance {guidance}
- trained by recipe `{recipe}`; MLflow run `{run}`; store version {store_version} of `{store}`
- autoencoder `{autoencoder}`, text encoders `{t5}` (T5) and `{clip}` (CLIP)

```
ldm sample --model THIS_FOLDER --out picture.png \\
    --prompt "a large red circle in the center, white background"
```
"""


def teacher_card(recipe: Recipe, config: ModelConfig) -> str:
    """Card of a teacher."""
    what = (
        "A text-conditioned latent diffusion transformer trained with flow matching "
        f"for {recipe.train.steps} steps of {recipe.train.batch_size} (EMA weights)."
    )
    return _card(f"{recipe.model_name}: teacher", what, recipe, config)


def student_card(recipe: Recipe, config: ModelConfig) -> str:
    """Card of a student."""
    what = (
        f"A few-step flow map distilled from the teacher `{config.lineage['teacher']}`, with its "
        f"guidance {recipe.distill.guidance} folded in: sample with guidance 1."
    )
    return _card(f"{recipe.model_name}: student", what, recipe, config)


def _card(title: str, what: str, recipe: Recipe, config: ModelConfig) -> str:
    backbone = config.backbone
    return _CARD.format(
        title=title,
        what=what,
        size=config.sizes[0],
        latent=f"{backbone.in_channels}x{backbone.latent_size[0]}x{backbone.latent_size[1]}",
        steps=config.steps,
        guidance=config.guidance,
        recipe=recipe.name,
        run=config.lineage["run"],
        store=config.lineage["store"],
        store_version=config.lineage["store_version"],
        autoencoder=config.autoencoder.digest,
        t5=config.t5.digest,
        clip=config.clip.digest,
    )
