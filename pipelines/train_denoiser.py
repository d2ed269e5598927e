"""Stage 3: the latent store -> a text-conditioned latent diffusion transformer, the teacher.

    open the newest version -> flow matching under Ray Train -> EMA weights as a model directory

The order of samples, noise, timesteps and dropped captions are functions of (seed, step, sample),
so that neither worker count nor a restart changes what is trained on.
"""

from functools import partial
from typing import Any

import ray.train.torch
import torch
from torch import Tensor, nn

from ldm_core.backbones.dit import DiT
from ldm_core.backbones.mmdit import MMDiT
from ldm_core.conditioning.text import TextCondition, drop_captions
from ldm_core.diffusion.denoiser import Network
from ldm_core.diffusion.timesteps import logit_normal
from ldm_core.errors import UserError
from ldm_core.latents.reader import LatentBatch, LatentReader, SamplePlan
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.media.buckets import Bucket
from ldm_core.model_directory import FORMAT, ModelConfig, Reference, save_model
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.training.draws import draw
from ldm_core.training.ema import Ema
from ldm_core.training.optimizers import hidden_matrices, muon_and_adamw, warmup_then_decay
from ldm_core.training.prefetch import prefetch
from ldm_core.training.step import TrainingStep, compute_dtype
from pipelines.backbones import (
    BackboneConfig,
    backbone_config,
    declared_space,
    lists_of_blocks,
    new_backbone,
)
from pipelines.cards import teacher_card
from pipelines.commands import command
from pipelines.meter import Meter
from pipelines.ray_training import Job, due, fit, restore, save
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import DistillSection, TrainSection
from pipelines.stage import Context, Options, Record, forget_record, run_stage, say_verdict
from pipelines.tracking import register_model
from pipelines.train_checks import check_training
from pipelines.train_plan import check_memory, plan_training
from pipelines.train_plan_table import print_plan
from pipelines.training_pictures import TrainingPictures


def train_denoiser(recipe: Recipe, options: Options) -> Record | None:
    """Train the teacher on the newest published version of the recipe's store.

    Raises:
        UserError: no published version, one of another size, other encoders than the initial
            model's, or a transformer or layout that does not fit: see `check_training`.
    """
    asked, recipe = recipe, recipe.located()
    section, store = recipe.train, LatentStore(recipe.product("latents"))
    if options.dry_run and not store.versions():
        plan = plan_training(recipe, declared_space(recipe))
        print_plan(plan, section, command(asked, "encode"))
        check_memory(plan, section.heads)
        say_verdict("train", f"would run once there is a store at {store.uri}")
        return None
    version = store.open_version(section.store_version)
    plan = check_training(recipe, version)
    if options.dry_run:
        print_plan(plan, section, command(asked, "train"))
    check_memory(plan, section.heads)
    check_pictures(version)

    def work(context: Context) -> dict[str, Any]:
        manifest = version.manifest
        context.run.dataset("latents", version.store.uri, manifest.content[:36], context="training")
        print(
            f"[train] {manifest.counts['samples']} samples of store version {version.number}, "
            f"{section.steps} steps of {section.batch_size}",
            flush=True,
        )
        summary = fit(context, worker, section.workers, section.steps, section.max_failures)
        name = f"{recipe.model_name}-teacher"
        model = summary["digest"]
        number = register_model(context.run, name, context.product, model, "champion")
        return {**summary, "registered": f"models:/{name}/{number}"}

    sections = {
        "format": FORMAT,  # a former one's product and checkpoints are of another network
        "train": section.deciding(),
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    return run_stage(
        recipe,
        "train",
        recipe.product("teacher"),
        sections,
        {"latents": version.manifest.content[:16]},
        work,
        options,
    )


def check_pictures(version: StoreVersion) -> None:
    """Refuse what the reader does not read.

    Raises:
        UserError: the store holds videos.
    """
    buckets = version.manifest.buckets
    if any(Bucket.parse(name).frames > 1 for name in buckets):
        raise UserError(
            f"{version.store.uri} version {version.number} holds videos, in the buckets "
            f"{', '.join(buckets)}, and training reads pictures of one bucket so far: "
            "encode pictures alone"
        )


def fitting(section: TrainSection, reader: LatentReader) -> BackboneConfig:
    """The transformer that fits what the reader reads."""
    return backbone_config(section, reader.shape, reader.token_width, reader.pooled_width)


def worker(config: dict[str, Job]) -> dict[str, Any]:
    """One Ray Train worker; returns the figures of the finished run."""
    job = config["job"]
    recipe, section = job.recipe, job.recipe.train
    rank, world, device = job.place()
    reader = LatentReader(pinned_version(job))
    plan = SamplePlan(recipe.seed, len(reader), section.batch_size)
    torch.manual_seed(recipe.seed)  # the same initial weights on every worker
    network = new_backbone(fitting(section, reader)).to(device)
    update = new_update(job, network, section, section.weight_decay)
    ema = Ema(network, section.ema_decay)
    first = restore(job, update, ema)
    if section.compile:
        for block in network.blocks:
            block.compile()
    model = ray.train.torch.prepare_model(
        network,
        move_to_device=False,
        # every step goes through the same graph: DDP then keeps less account of it
        parallel_strategy_kwargs={"static_graph": True, "gradient_as_bucket_view": True},
    )
    loss = partial(teacher_loss, recipe, model, reader.null_condition().to(device))
    pictures = TrainingPictures(job, reader, network.config, device) if rank == 0 else None

    def read(step: int) -> LatentBatch:
        return reader.batch(*plan.rows_at(step, rank, world), recipe.seed)

    meter = Meter()
    for step, batch in meter.waiting_for(prefetch(read, first, section.steps)):
        multiplier = warmup_then_decay(
            step, section.steps, section.warmup_steps, section.decay_fraction
        )
        result = update(partial(loss, batch, step), multiplier)
        ema.update(network)
        meter.count(section.batch_size)
        done = step + 1
        if rank == 0 and due(done, section.log_every, section.steps):
            rate = section.learning_rate * multiplier
            epoch = done * section.batch_size / len(reader)
            figures = {"learning_rate": rate, "epoch": epoch, "skipped_steps": update.skipped}
            figures |= {"loss": result.loss, "gradient_norm": result.gradient_norm}
            job.log(done, figures | meter.read(), f"loss {result.loss:.4f}")
        if pictures and due(done, section.sample_every, section.steps):
            pictures.log(ema, done)
        if done % section.checkpoint_every == 0 and done < section.steps:
            save(job, update, ema, done)
    return _finish(job, reader.version, network, ema, meter) if rank == 0 else {}


def pinned_version(job: Job) -> StoreVersion:
    """A store version of the content the stage began with, also after a restart."""
    return LatentStore(job.recipe.product("latents")).version_of(job.inputs["latents"])


def new_update(
    job: Job, network: nn.Module, section: TrainSection | DistillSection, weight_decay: float
) -> TrainingStep:
    """What updates the transformer on this worker: Muon for hidden matrices, AdamW for the rest."""
    rank, world, device = job.place()
    dtype = compute_dtype(device, job.recipe.precision)
    matrices = hidden_matrices(*lists_of_blocks(network))
    optimizers = muon_and_adamw(
        network, matrices, section.learning_rate, weight_decay, dtype, rank, world
    )
    return TrainingStep(network, optimizers, device, dtype, section.clip_norm)


def teacher_loss(
    recipe: Recipe, model: Network, null: TextCondition, batch: LatentBatch, step: int
) -> Tensor:
    """Flow matching of a batch at a step, (B,), with some of its captions dropped."""
    section, device = recipe.train, null.tokens.device
    shape = tuple(batch.latents.shape[1:])
    draws = draw(recipe.seed, step, batch.ids, shape, section.caption_drop)
    t = logit_normal(
        draws.u, section.timestep_mean, section.timestep_std, section.timestep_shift
    ).to(device)
    cond = drop_captions(batch.condition.to(device), null, draws.drop.to(device))
    return flow_matching_loss(model, batch.latents.to(device), draws.eps.to(device), t, cond)


def _finish(
    job: Job, version: StoreVersion, network: DiT | MMDiT, ema: Ema, meter: Meter
) -> dict[str, Any]:
    """Save the teacher; returns the summary."""
    summary = {
        "steps": job.recipe.train.steps,
        "parameters": sum(p.numel() for p in network.parameters()),
        **meter.mean(),
    }
    return {**summary, "digest": save_teacher(job, version, network.config, ema)}


def save_teacher(job: Job, version: StoreVersion, backbone: BackboneConfig, ema: Ema) -> str:
    """Write the model directory; returns its digest."""
    recipe, manifest = job.recipe, version.manifest
    forget_record(job.product)
    texts = {entry.name: entry for entry in manifest.texts}
    config = ModelConfig(
        kind="teacher",
        backbone=backbone,
        latents_mean=manifest.statistics.mean,
        latents_std=manifest.statistics.std,
        sizes=tuple(bucket.rpartition("x")[0] for bucket in manifest.buckets),
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
        },
    )
    return save_model(job.product, config, ema.state_dict(), teacher_card(recipe, config, version))
