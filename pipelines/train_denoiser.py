"""Stage 3: the latent store -> a text-conditioned latent diffusion transformer, the teacher.

    open the newest version -> flow matching under Ray Train -> EMA weights as a model directory

The order of samples, noise, timesteps and dropped captions are functions of (seed, step, sample),
so that neither worker count nor a restart changes what is trained on.
"""

from typing import Any

import numpy as np
import ray.train.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.conditioning.text import drop_captions
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.timesteps import linear_grid, logit_normal
from ldm_core.errors import UserError
from ldm_core.generation import grid_image
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.latents.manifest import Manifest
from ldm_core.latents.reader import LatentBatch, LatentReader, SamplePlan
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.media.decode import to_image
from ldm_core.model_directory import ModelConfig, Reference, save_model
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.samplers.euler import sample_euler
from ldm_core.training.draws import draw
from ldm_core.training.ema import Ema
from ldm_core.training.optimizers import hidden_matrices, muon_and_adamw, warmup_then_decay
from ldm_core.training.prefetch import prefetch
from ldm_core.training.step import TrainingStep, compute_dtype
from pipelines.cards import teacher_card
from pipelines.ray_training import Job, Meter, fit, restore, save
from pipelines.recipe_options import describe_errors
from pipelines.recipes.schema import Recipe, TrainSection
from pipelines.stage import Context, Options, Record, run_stage
from pipelines.tracking import register_model

NOT_IN_DIGEST = frozenset(
    {"workers", "log_every", "sample_every", "checkpoint_every", "max_failures", "compile"}
)
PREVIEWS = 8


def train_denoiser(recipe: Recipe, options: Options) -> Record:
    """Train the teacher on the newest published version of the recipe's store.

    Raises:
        UserError: no published version, or a width or patch size that does not fit its latents.
    """
    recipe = recipe.located()
    version = LatentStore(recipe.product("latents")).open_version()
    section = recipe.train
    check_sizes(section, version.manifest)

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
        summary["registered"] = (
            f"models:/{name}/{register_model(context.run, name, context.product, 'champion')}"
        )
        return summary

    sections = {
        "train": section.model_dump(mode="json", exclude=set(NOT_IN_DIGEST)),
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


def check_sizes(section: TrainSection, manifest: Manifest) -> None:
    """Refuse here, not in a worker, a transformer that does not fit the store's latents.

    Raises:
        UserError: a width, number of heads or patch size that does not divide.
    """
    for bucket in manifest.buckets:
        height, width, _ = (int(side) // manifest.downsampling for side in bucket.split("x"))
        try:  # the manifest does not know the embeddings' widths, and any of them would do
            backbone_config(section, (manifest.channels, height, width), 1, 1)
        except ValidationError as error:
            raise UserError(f"train: {describe_errors(error)}") from error


def backbone_config(
    section: TrainSection, latent: tuple[int, ...], text_width: int, pooled_width: int
) -> DiTConfig:
    """The transformer that fits latents (C, h, w) and embeddings of these widths."""
    channels, height, width = latent
    return DiTConfig(
        in_channels=channels,
        latent_size=(height, width),
        patch_size=section.patch_size,
        width=section.width,
        depth=section.depth,
        heads=section.heads,
        text_width=text_width,
        pooled_width=pooled_width,
    )


def fitting(section: TrainSection, reader: LatentReader) -> DiTConfig:
    """The transformer that fits what the reader reads."""
    return backbone_config(section, reader.shape, reader.token_width, reader.pooled_width)


def worker(config: dict[str, Job]) -> dict[str, Any]:
    """One Ray Train worker; returns the figures of the finished run."""
    job = config["job"]
    recipe, section = job.recipe, job.recipe.train
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), job.device()
    reader = LatentReader(pinned_version(job))
    plan = SamplePlan(recipe.seed, len(reader), section.batch_size)
    null = reader.null_condition().to(device)

    torch.manual_seed(recipe.seed)  # the same initial weights on every worker
    network = DiT(fitting(section, reader)).to(device)
    dtype = compute_dtype(device, recipe.precision)
    optimizers = muon_and_adamw(
        network,
        hidden_matrices(network.blocks),
        section.learning_rate,
        section.weight_decay,
        dtype,
        rank,
        world,
    )
    ema = Ema(network, section.ema_decay)
    first = 0
    if state := restore():
        network.load_state_dict(state["network"])
        optimizers.load_state_dict(state["optimizers"])
        ema.load_state_dict(state["ema"], state["ema_updates"])
        first = state["step"]
    if section.compile:
        for block in network.blocks:
            block.compile()
    model = ray.train.torch.prepare_model(network, move_to_device=False)
    update = TrainingStep(network, optimizers, device, dtype, section.clip_norm)
    preview = Preview(job, reader, device) if rank == 0 else None

    def read(step: int) -> LatentBatch:
        return reader.batch(*plan.rows_at(step, rank, world), recipe.seed)

    def losses(batch: LatentBatch, step: int) -> Tensor:
        draws = draw(recipe.seed, step, batch.ids, reader.shape, section.caption_drop)
        t = logit_normal(
            draws.u, section.timestep_mean, section.timestep_std, section.timestep_shift
        )
        cond = drop_captions(batch.condition.to(device), null, draws.drop.to(device))
        x0, eps = batch.latents.to(device), draws.eps.to(device)
        return flow_matching_loss(model, x0, eps, t.to(device), cond)

    meter = Meter()
    batches = prefetch(read, first, section.steps)
    for step in range(first, section.steps):
        with meter.waiting():
            _, batch = next(batches)
        multiplier = warmup_then_decay(
            step, section.steps, section.warmup_steps, section.decay_fraction
        )
        result = update(lambda: losses(batch, step), multiplier)  # noqa: B023
        ema.update(network)
        meter.count(section.batch_size)
        done = step + 1
        if rank == 0 and (done % section.log_every == 0 or done == section.steps):
            figures = {
                "loss": result.loss,
                "gradient_norm": result.gradient_norm,
                "learning_rate": section.learning_rate * multiplier,
                "skipped_steps": update.skipped,
                "epoch": done * section.batch_size / len(reader),
                **meter.read(),
            }
            job.run.metrics(figures, done)
            job.board.post.remote(done, f"loss {result.loss:.4f}")
        if preview and (done % section.sample_every == 0 or done == section.steps):
            preview.log(ema, done)
        if done % section.checkpoint_every == 0 and done < section.steps:
            save(
                lambda: {
                    "network": network.state_dict(),
                    "optimizers": optimizers.state_dict(),
                    "ema": ema.state_dict(),
                    "ema_updates": ema.updates,
                    "step": done,  # noqa: B023
                },
                {"step": done},
            )
    if rank:
        return {}
    parameters = sum(p.numel() for p in network.parameters())
    digest = save_teacher(job, reader.version, network.config, ema)
    return {"steps": section.steps, "parameters": parameters, "digest": digest, **meter.mean()}


def pinned_version(job: Job) -> StoreVersion:
    """A store version of the content the stage began with, also after a restart."""
    return LatentStore(job.recipe.product("latents")).version_of(job.inputs["latents"])


class Preview:
    """Pictures of fixed captions and seeds by the EMA weights, logged as training goes on."""

    def __init__(self, job: Job, reader: LatentReader, device: torch.device) -> None:
        self.job, self.reader, self.device = job, reader, device
        rows = np.arange(min(PREVIEWS, len(reader)))
        self.batch = reader.batch(rows, np.zeros_like(rows), job.recipe.seed)
        self.autoencoder = load_autoencoder(job.recipe.autoencoder_uri, device)
        self.network = DiT(fitting(job.recipe.train, reader)).to(device).eval()
        job.run.document(self.batch.captions, "preview-captions.json")

    @torch.no_grad()
    def log(self, ema: Ema, step: int) -> None:
        """Sample and log one grid."""
        self.network.load_state_dict(ema.state_dict())
        seed = self.job.recipe.seed
        eps = draw(seed, 0, self.batch.ids, self.reader.shape, 0.0).eps.to(self.device)
        denoiser = Denoiser(self.network, FlowProcess(), Prediction.VELOCITY)
        null = self.reader.null_condition().to(self.device)
        guided = ClassifierFreeGuidance(denoiser, self.job.recipe.train.guidance, null)
        grid = linear_grid(self.job.recipe.train.sample_steps).to(self.device)
        x0 = sample_euler(guided, eps, grid, self.batch.condition.to(self.device)).cpu()
        pictures = to_image(self.autoencoder.decode(x0 * self.reader.std + self.reader.mean).cpu())
        self.job.run.image(grid_image(pictures), "samples", step)


def save_teacher(job: Job, version: StoreVersion, backbone: DiTConfig, ema: Ema) -> str:
    """Write the model directory; returns its digest."""
    recipe, manifest = job.recipe, version.manifest
    texts = {entry.name: entry for entry in manifest.texts}
    config = ModelConfig(
        kind="teacher",
        backbone=backbone,
        latents_mean=manifest.statistics.mean,
        latents_std=manifest.statistics.std,
        sizes=(f"{recipe.size}x{recipe.size}",),
        autoencoder=Reference(uri=manifest.autoencoder.uri, digest=manifest.autoencoder.digest),
        t5=Reference(uri=texts["t5"].uri, digest=texts["t5"].digest),
        clip=Reference(uri=texts["clip"].uri, digest=texts["clip"].digest),
        max_tokens=recipe.text.max_tokens,
        steps=recipe.train.sample_steps,
        guidance=recipe.train.guidance,
        lineage={
            "run": job.run.id,
            "store": version.store.uri,
            "store_version": str(version.number),
            "store_content": manifest.content,
        },
    )
    return save_model(job.product, config, ema.state_dict(), teacher_card(recipe, config))
