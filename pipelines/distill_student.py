"""Stage 4: teacher + store -> a student that needs a few steps and no guidance.

    the version the teacher read -> guidance, trajectories and longer leaps under Ray Train
         -> EMA weights as a model directory

What each step learns is in `ldm_core/distillation/student.py`.
"""

from functools import partial
from typing import Any

import ray.train.torch
import torch

from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.backbones.dit import DiT
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.flow_map import FlowMap
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.distillation.student import DistillationLosses, student_of
from ldm_core.errors import UserError
from ldm_core.latents.reader import LatentBatch, LatentReader, SamplePlan
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.media.buckets import Bucket
from ldm_core.model_directory import ModelConfig, load_model, save_model
from ldm_core.training.checkpoint_state import architecture_of
from ldm_core.training.draws import draw
from ldm_core.training.ema import Ema
from ldm_core.training.optimizers import hidden_matrices, muon_and_adamw
from ldm_core.training.prefetch import prefetch
from ldm_core.training.schedules import warmup_then_decay
from ldm_core.training.step import TrainingStep, compute_dtype
from pipelines.backbones import lists_of_blocks
from pipelines.cards import student_card
from pipelines.meter import Meter
from pipelines.model_registry import register_model
from pipelines.ray_training import Job, due, fit
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import DistillSection
from pipelines.stage import Context, Options, Record, forget_record, run_stage
from pipelines.training_state import Resuming

WARMUP_STEPS = 10


def distill_student(recipe: Recipe, options: Options) -> Record | None:
    """Distil the recipe's teacher into a student.

    Raises:
        UserError: no teacher, or its store no longer holds what it was trained on.
    """
    recipe = recipe.located()
    config, network, digest = load_model(recipe.product("teacher"))
    if not isinstance(network, DiT):
        kind = type(config.backbone).__name__.removesuffix("Config").lower()
        if isinstance(config.backbone, DiffusersConfig):
            kind = f"{config.backbone.class_name} of diffusers"
        raise UserError(
            f"{recipe.product('teacher')} is a model of kind {kind}, which takes no second time as "
            "a student does: distil a teacher whose train.backbone is dit"
        )
    section = recipe.distill
    latents = config.lineage.get("store_content", "")[:16]
    if not latents:
        raise UserError(
            f"{recipe.product('teacher')} does not say which latents it was trained on "
            "(lineage.store_content in its config.json): distil a teacher that `ldm train` made"
        )

    def work(context: Context) -> dict[str, Any]:
        check_pictures(LatentStore(recipe.product("latents")).version_of(latents))
        context.run.tags({"parent.teacher": config.lineage["run"]})
        print(f"[distill] teacher {digest}, {section.steps} steps", flush=True)
        summary = fit(context, worker, section.workers, section.steps, section.max_failures)
        name, model = recipe.model_name, summary["digest"]
        version = register_model(context.run, name, context.product, model, "champion")
        return {**summary, "registered": f"models:/{name}/{version}"}

    sections = {
        "distill": section.deciding(),
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    inputs = {"teacher": digest, "latents": latents}
    return run_stage(recipe, "distill", recipe.product("student"), sections, inputs, work, options)


def worker(config: dict[str, Job]) -> dict[str, Any]:
    """One Ray Train worker; returns the figures of the finished run."""
    job = config["job"]
    recipe, section = job.recipe, job.recipe.distill
    rank, world, device = job.place()
    reader = LatentReader(pinned_version(job))
    plan = SamplePlan(recipe.seed + 1, len(reader), section.batch_size)
    teacher_config, teacher, teacher_digest = load_model(recipe.product("teacher"))
    reader.mean, reader.std = (  # of the teacher's latents, which may be those of several stores
        torch.tensor(values).view(reader.mean.shape)
        for values in (teacher_config.latents_mean, teacher_config.latents_std)
    )
    assert isinstance(teacher, DiT), "refused when the stage began"
    teacher.requires_grad_(False).to(device)
    network = student_of(teacher).to(device)
    averaged = student_of(teacher).to(device).requires_grad_(False)
    update = new_update(job, network)
    ema = Ema(network, section.ema_decay)
    resuming = Resuming(job, update, {"model": ema}, architecture_of(network))
    first = resuming.restore()
    model = ray.train.torch.prepare_model(network, move_to_device=False)
    null = reader.null_condition().to(device)
    losses = _losses(section, FlowMap(model), FlowMap(averaged), teacher, null)

    def read(step: int) -> LatentBatch:
        return reader.batch(*plan.rows_at(step, rank, world), recipe.seed)

    meter = Meter()
    for step, batch in meter.waiting_for(prefetch(read, first, section.steps)):
        draws = draw(recipe.seed + 1, step, batch.ids, reader.shape, caption_drop=0.0)
        phase, loss = losses.at(step)
        if phase == "shortcut":  # the one that asks the average
            averaged.load_state_dict(ema.state_dict())
        x0, cond = batch.latents.to(device), batch.condition.to(device)
        multiplier = warmup_then_decay(step, section.steps, WARMUP_STEPS, 0.4)
        result = update(partial(loss, x0, draws, cond), multiplier)
        ema.update(network)
        meter.count(section.batch_size)
        done = step + 1
        if rank == 0 and due(done, section.log_every, section.steps):
            figures = {"gradient_norm": result.gradient_norm, "skipped_steps": update.skipped}
            figures |= {f"loss/{phase}": result.loss, **meter.read()}
            job.log(done, figures, f"{phase} loss {result.loss:.4f}")
        if done % section.checkpoint_every == 0 and done < section.steps:
            resuming.save(done)
    resuming.wait()
    if rank:
        return {}
    summary = {"steps": section.steps, **meter.mean()}
    digest = save_student(job, reader.version, teacher_config, teacher_digest, network, ema)
    return {**summary, "digest": digest}


def check_pictures(version: StoreVersion) -> None:
    """Refuse what distillation does not read yet.

    Raises:
        UserError: the store holds videos.
    """
    buckets = version.manifest.buckets
    if any(Bucket.parse(name).frames > 1 for name in buckets):
        raise UserError(
            f"{version.store.uri} version {version.number} holds videos, in the buckets "
            f"{', '.join(buckets)}, and students are of pictures of one bucket so far"
        )


def pinned_version(job: Job) -> StoreVersion:
    """A store version of the content the stage began with, also after a restart."""
    return LatentStore(job.recipe.product("latents")).version_of(job.inputs["latents"])


def new_update(job: Job, network: DiT) -> TrainingStep:
    """What updates the student on this worker: Muon for hidden matrices, AdamW for the rest."""
    rank, world, device = job.place()
    section = job.recipe.distill
    dtype = compute_dtype(device, job.recipe.precision)
    matrices = hidden_matrices(*lists_of_blocks(network))
    optimizers = muon_and_adamw(network, matrices, section.learning_rate, 0.0, dtype, rank, world)
    return TrainingStep(network, optimizers, device, dtype, section.clip_norm)


def _losses(
    section: DistillSection,
    student: FlowMap,
    averaged: FlowMap,
    teacher: DiT,
    null: TextCondition,
) -> DistillationLosses:
    return DistillationLosses(
        student,
        averaged,
        Denoiser(teacher, FlowProcess(), Prediction.VELOCITY),
        null,
        section.guidance,
        section.guidance_steps,
        section.student_steps,
        section.teacher_substeps,
    )


def save_student(
    job: Job,
    version: StoreVersion,
    teacher: ModelConfig,
    teacher_digest: str,
    network: DiT,
    ema: Ema,
) -> str:
    """Write the model directory; returns its digest."""
    lineage = {
        **teacher.lineage,
        "run": job.run.id,
        "teacher": teacher_digest,
        "teacher_run": teacher.lineage["run"],
    }
    config = teacher.model_copy(
        update={
            "kind": "student",
            "backbone": network.config,
            "steps": job.recipe.distill.student_steps,
            "guidance": 1.0,
            "lineage": lineage,
        }
    )
    card = student_card(job.recipe, config, version)
    forget_record(job.product)
    return save_model(job.product, config, ema.state_dict(), card)
