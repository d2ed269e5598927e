"""Model cards: the README.md of a model directory."""

import shlex

from ldm_core.latents.store import StoreVersion
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
    --prompt {prompt}
```
"""


def teacher_card(recipe: Recipe, config: ModelConfig, version: StoreVersion) -> str:
    """Card of a teacher, with a prompt out of the store version it was trained on."""
    what = (
        "A text-conditioned latent diffusion transformer trained with flow matching "
        f"for {recipe.train.steps} steps of {recipe.train.batch_size} (EMA weights)."
    )
    return _card("teacher", what, recipe, config, version)


def student_card(recipe: Recipe, config: ModelConfig, version: StoreVersion) -> str:
    """Card of a student, with a prompt out of the store version it was trained on."""
    what = (
        f"A few-step flow map distilled from the teacher `{config.lineage['teacher']}`, with its "
        f"guidance {recipe.distill.guidance} folded in: sample with guidance 1."
    )
    return _card("student", what, recipe, config, version)


def _card(kind: str, what: str, recipe: Recipe, config: ModelConfig, version: StoreVersion) -> str:
    side = version.manifest.downsampling
    latent = (int(pixels) // side for pixels in config.sizes[0].split("x"))
    return _CARD.format(
        title=f"{recipe.name}: {kind}",
        prompt=shlex.quote(_caption(version)),
        what=what,
        size=config.sizes[0],
        latent="x".join(map(str, (config.backbone.in_channels, *latent))),
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


def _caption(version: StoreVersion) -> str:
    """The first caption of the store, on one line."""
    batches = version.batches("samples", ["captions"])
    captions = next(row for batch in batches for row in batch["captions"].to_pylist())
    return " ".join(captions[0]["caption"].split())
