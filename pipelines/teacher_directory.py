"""The teacher as a model directory."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.store import StoreVersion
from ldm_core.model_directory import ModelConfig, Reference, save_model
from pipelines.backbones import BackboneConfig
from pipelines.cards import teacher_card
from pipelines.ray_training import Job
from pipelines.stage import forget_record


def save_teacher(
    job: Job,
    version: StoreVersion,
    backbone: BackboneConfig,
    statistics: LatentStatistics,
    weights: Mapping[str, Tensor],
    buckets: Iterable[str] = (),
) -> str:
    """Write the model directory; returns its digest.

    Args:
        job: whose product it is.
        version: of the store that was trained on.
        backbone: of the network.
        statistics: by which latents were normalised.
        weights: averaged, whole.
        buckets: that were trained on besides the version's own.
    """
    recipe, manifest = job.recipe, version.manifest
    forget_record(job.product)
    named = (*manifest.buckets, *buckets)
    texts = {entry.name: entry for entry in manifest.texts}
    config = ModelConfig(
        kind="teacher",
        backbone=backbone,
        latents_mean=statistics.mean,
        latents_std=statistics.std,
        sizes=tuple(dict.fromkeys(bucket.rpartition("x")[0] for bucket in named)),
        autoencoder=Reference(uri=manifest.autoencoder.uri, digest=manifest.autoencoder.digest),
        t5=Reference(uri=texts["t5"].uri, digest=texts["t5"].digest),
        clip=Reference(uri=texts["clip"].uri, digest=texts["clip"].digest),
        max_tokens=manifest.max_tokens,
        steps=recipe.train.sample_steps,
        guidance=recipe.train.guidance,
        lineage={
            "run": job.run.id,
            "store": version.store.uri,
            "store_version": str(version.number),
            "store_content": manifest.content,
            **{name: digest for name, digest in job.inputs.items() if name != "latents"},
        },
    )
    return save_model(job.product, config, dict(weights), teacher_card(recipe, config, version))
