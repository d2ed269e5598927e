"""The teacher as a model directory."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from ldm_core.files import join, remove
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.store import StoreVersion
from ldm_core.model_directory import ModelConfig, Reference, save_model
from ldm_core.training.adapter_weights import Adapters
from pipelines.backbones import BackboneConfig
from pipelines.cards import teacher_card
from pipelines.ray_training import Job
from pipelines.stage import forget_record
from pipelines.teacher_places import ADAPTER, snapshots_place


def save_teacher(
    job: Job,
    version: StoreVersion,
    backbone: BackboneConfig,
    statistics: LatentStatistics,
    weights: Mapping[str, Tensor],
    buckets: Iterable[str] = (),
    adapters: Mapping[str, Tensor] = {},
) -> str:
    """Write the model directory; returns its digest.

    Args:
        job: whose product it is.
        version: of the store that was trained on.
        backbone: of the network.
        statistics: by which latents were normalised.
        weights: averaged, whole.
        buckets: that were trained on besides the version's own.
        adapters: that are merged into the weights, if any, to be kept beside them as they are.
    """
    recipe, manifest = job.recipe, version.manifest
    forget_record(job.product)
    remove(join(job.product, ADAPTER))  # of the teacher that was here before
    rank, initial = recipe.train.lora_rank, recipe.train.initial
    if adapters:
        assert rank
        assert initial
        Adapters(adapters, rank, rank, initial).save(join(job.product, ADAPTER))
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
            **({"lora_rank": str(rank)} if rank else {}),
            **_snapshots(job),
        },
    )
    return save_model(job.product, config, dict(weights), teacher_card(recipe, config, version))


def _snapshots(job: Job) -> dict[str, str]:
    """Where averages of any length can be made of."""
    if not job.recipe.train.ema_lengths:
        return {}
    return {"snapshots": snapshots_place(job.product, job.checkpoints.rpartition("/")[2])}
