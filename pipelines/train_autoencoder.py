"""Stage 1: captioned pictures -> an autoencoder in diffusers' layout, with latent statistics.

list the pictures -> train under Ray Train -> measure -> mean and std per channel
"""

import tempfile
from functools import partial
from typing import Any

import numpy as np
import ray.train.torch
import torch
from torch import Tensor

from ldm_core import random
from ldm_core.autoencoders.autoencoder import DiffusersAutoencoder, Posterior
from ldm_core.autoencoders.losses import autoencoder_loss
from ldm_core.autoencoders.training import (
    Reconstruction,
    halved,
    latent_statistics,
    new_autoencoder,
    psnr,
)
from ldm_core.errors import UserError
from ldm_core.files import file_sizes, join, remove, upload_folder
from ldm_core.generation import grid_image
from ldm_core.latents.ledger import fingerprint
from ldm_core.latents.reader import SamplePlan
from ldm_core.media.folder import CaptionedImage, list_captioned_images
from ldm_core.media.pixels import to_image
from ldm_core.training.optimizers import hidden_kernels, muon_and_adamw, warmup_then_decay
from ldm_core.training.prefetch import prefetch
from ldm_core.training.step import TrainingStep, compute_dtype
from pipelines.meter import Meter
from pipelines.picture_reader import Pictures
from pipelines.ray_training import Job, due, fit
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection
from pipelines.stage import Context, Options, Record, forget_record, run_stage, say_verdict
from pipelines.training_state import Resuming

STATISTICS = 512
WARMUP_STEPS = 20
LEAST_HALVED = 16  # pixels: half of them is 8, 4 and 2 at the loss's three scales


def train_autoencoder(recipe: Recipe, options: Options) -> Record | None:
    """Train the recipe's autoencoder; None if the recipe takes an existing one.

    Raises:
        UserError: no pictures, or of a size that cannot be halved as the recipe wants.
    """
    recipe = recipe.located()
    section = recipe.autoencoder
    if section.source != "train":
        print(f"[autoencoder] nothing to train: the recipe takes {section.source}", flush=True)
        if options.dry_run:
            say_verdict("autoencoder", "has nothing to do")
        return None
    check_halving(recipe)
    images, sizes = list_captioned_images(recipe.data).images, file_sizes(recipe.data)

    def work(context: Context) -> dict[str, Any]:
        print(f"[autoencoder] {len(images)} pictures, {section.steps} steps", flush=True)
        train = partial(worker, images)  # all of them train on what was listed here
        return fit(context, train, section.workers, section.steps, section.max_failures)

    sections = {
        "autoencoder": section.deciding(),
        "size": recipe.size,
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    inputs = {"data": fingerprint([(image.id, sizes.get(image.uri)) for image in images])[:16]}
    return run_stage(
        recipe, "autoencoder", recipe.product("autoencoder"), sections, inputs, work, options
    )


def check_halving(recipe: Recipe) -> None:
    """Half a picture is to be whole latents, and wide enough for the loss's three scales.

    Raises:
        UserError: it is not, though the recipe halves.
    """
    section = recipe.autoencoder
    side = 2 * section.downsampling
    if section.halved_share and (recipe.size % side or recipe.size < LEAST_HALVED):
        fitting = side * max(recipe.size // side, -(-LEAST_HALVED // side))
        raise UserError(
            f"autoencoder.halved_share is {section.halved_share:g}, so size is to be a multiple of "
            f"{side} from {LEAST_HALVED} on, not {recipe.size}: try --set size={fitting} or "
            "--set autoencoder.halved_share=0"
        )


def worker(images: list[CaptionedImage], config: dict[str, Job]) -> dict[str, Any]:
    """One Ray Train worker on the listed pictures; returns the figures of the finished run."""
    job = config["job"]
    recipe, section = job.recipe, job.recipe.autoencoder
    rank, world, device = job.place()
    pictures = Pictures(images, recipe.size, recipe.seed)
    plan = SamplePlan(recipe.seed, len(pictures.trained), section.batch_size)
    latent = (section.channels, *(recipe.size // section.downsampling,) * 2)
    update = _new_update(recipe, rank, world, device)
    levels = section.model_dump(include={"block_channels", "channels", "layers_per_block"})
    resuming = Resuming(job, update, {}, {"class": "AutoencoderKL", **levels})
    first = resuming.restore()
    reconstruct = ray.train.torch.prepare_model(
        Reconstruction(update.network), move_to_device=False
    )

    def read(step: int) -> tuple[Tensor, Tensor]:
        pixels, ids = pictures.batch(pictures.trained[plan.rows_at(step, rank, world)[0]])
        eps = random.normal(recipe.seed, "posterior", step, ids, latent)
        return pixels.to(device), eps.to(device)

    meter = Meter()
    for step, (pixels, eps) in meter.waiting_for(prefetch(read, first, section.steps)):
        loss = partial(_loss, section, reconstruct, pixels, eps, _halves(recipe, step))
        result = update(loss, warmup_then_decay(step, section.steps, WARMUP_STEPS, 0.4))
        meter.count(section.batch_size)
        done = step + 1
        if rank == 0 and due(done, section.log_every, section.steps):
            figures = {"loss": result.loss, "skipped_steps": update.skipped, **meter.read()}
            job.log(done, figures, f"loss {result.loss:.4f}")
        if done % section.checkpoint_every == 0 and done < section.steps:
            resuming.save(done)
    resuming.wait()
    if rank:
        return {}
    return {**meter.mean(), **_finish(job, update.network, pictures, device)}


def _new_update(recipe: Recipe, rank: int, world: int, device: torch.device) -> TrainingStep:
    section, dtype = recipe.autoencoder, compute_dtype(device, recipe.precision)
    levels = (section.block_channels, section.channels, section.layers_per_block)
    network = new_autoencoder(*levels, recipe.size, recipe.seed).to(device)
    optimizers = muon_and_adamw(
        network, hidden_kernels(network), section.learning_rate, 0.0, dtype, rank, world
    )
    return TrainingStep(network, optimizers, device, dtype, section.clip_norm)


def _halves(recipe: Recipe, step: int) -> bool:
    """Whether this step decodes halved latents: all workers alike, as that takes less time."""
    u = random.uniform(recipe.seed, "halve", step, torch.zeros(1, dtype=torch.int64), ())
    return bool(u < recipe.autoencoder.halved_share)


def _loss(
    section: AutoencoderSection,
    reconstruct: torch.nn.Module,
    pixels: Tensor,
    eps: Tensor,
    halve: bool,
) -> Tensor:
    """(B,), in float32 whatever the network computes in."""
    decoded, mean, logvar = reconstruct(pixels, eps, halve)
    return autoencoder_loss(
        halved(pixels) if halve else pixels,
        decoded.float(),
        Posterior(mean.float(), logvar.float()),
        section.kl_weight,
        section.perceptual_weight,
    ).total


def _finish(job: Job, network: Any, pictures: Pictures, device: torch.device) -> dict[str, float]:
    """Measure, keep the statistics in the config where diffusers keeps them, and save."""
    autoencoder = DiffusersAutoencoder(network, "", device)
    some = pictures.trained[:STATISTICS]
    posteriors = [
        autoencoder.encode(pictures.batch(some[start : start + 64])[0])
        for start in range(0, len(some), 64)
    ]
    mean, std = latent_statistics(
        Posterior(
            torch.cat([posterior.mean for posterior in posteriors]),
            torch.cat([posterior.logvar for posterior in posteriors]),
        )
    )
    network.register_to_config(latents_mean=mean, latents_std=std)
    pixels, _ = pictures.batch(pictures.held_out)
    decoded = autoencoder.decode(autoencoder.encode(pixels).mean).cpu()
    figures = {"psnr": float(psnr(pixels, decoded).mean()), "latent_std": float(np.mean(std))}
    job.run.metrics(figures, job.recipe.autoencoder.steps)
    sheet = grid_image(np.concatenate([to_image(pixels[:16]), to_image(decoded[:16])]), columns=8)
    job.run.image(sheet, "reconstructions", job.recipe.autoencoder.steps)
    with tempfile.TemporaryDirectory(prefix="ldm-autoencoder-") as folder:
        network.save_pretrained(folder, safe_serialization=True)
        forget_record(job.product)
        remove(join(job.product, "config.json"))  # no old statistics beside new weights
        upload_folder(folder, job.product)
    return figures
