"""Stage 1: captioned pictures -> an autoencoder in diffusers' layout, with latent statistics.

list the pictures -> train under Ray Train -> measure -> mean and std per channel
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
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
    latent_statistics,
    new_autoencoder,
    psnr,
)
from ldm_core.errors import BadMedia, UserError
from ldm_core.files import file_sizes, upload_folder
from ldm_core.generation import grid_image
from ldm_core.latents.ledger import fingerprint
from ldm_core.latents.reader import SamplePlan, sample_key
from ldm_core.media.decode import decode_image, fit_to_square, to_image, to_pixels
from ldm_core.media.folder import list_captioned_images, read_bytes
from ldm_core.training.optimizers import hidden_kernels, muon_and_adamw, warmup_then_decay
from ldm_core.training.prefetch import prefetch
from ldm_core.training.step import TrainingStep, compute_dtype
from pipelines.ray_training import Job, Meter, fit, restore, save
from pipelines.recipes.schema import Recipe
from pipelines.stage import Context, Options, Record, run_stage

HELD_OUT = 64
STATISTICS = 512
CACHE_BYTES = 2 << 30  # of decoded pictures, on every worker


def train_autoencoder(recipe: Recipe, options: Options) -> Record | None:
    """Train the recipe's autoencoder; None if the recipe takes an existing one.

    Raises:
        UserError: no pictures.
    """
    recipe = recipe.located()
    section = recipe.autoencoder
    if section.source != "train":
        print(f"[autoencoder] nothing to train: the recipe takes {section.source}", flush=True)
        return None
    images, sizes = list_captioned_images(recipe.data).images, file_sizes(recipe.data)

    def work(context: Context) -> dict[str, Any]:
        print(f"[autoencoder] {len(images)} pictures, {section.steps} steps", flush=True)
        return fit(context, worker, section.workers, section.steps, recipe.train.max_failures)

    sections = {
        "autoencoder": section.model_dump(mode="json", exclude={"workers", "checkpoint_every"}),
        "size": recipe.size,
        "seed": recipe.seed,
        "precision": recipe.precision,
    }
    inputs = {"data": fingerprint([(image.id, sizes.get(image.uri)) for image in images])[:16]}
    return run_stage(
        recipe, "autoencoder", recipe.product("autoencoder"), sections, inputs, work, options
    )


class Pictures:
    """The folder's pictures as tensors, decoded once; unusable ones give way to their neighbour."""

    def __init__(self, recipe: Recipe) -> None:
        self.images = list_captioned_images(recipe.data).images
        self.size = recipe.size
        self._pool = ThreadPoolExecutor(4)
        self._read = lru_cache(maxsize=CACHE_BYTES // (3 * self.size**2))(self._decode)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] and int64 ids (B,)."""
        found = list(self._pool.map(self._usable, rows.tolist()))
        pixels = torch.stack([to_pixels(array) for _, array in found])
        return pixels.contiguous(memory_format=torch.channels_last), torch.tensor(
            [sample_key(self.images[row].id) for row, _ in found]
        )

    def _decode(self, row: int) -> np.ndarray | None:
        try:
            return fit_to_square(decode_image(read_bytes(self.images[row].uri)), self.size)[0]
        except BadMedia:
            return None  # the encode stage reports it with its reason

    def _usable(self, row: int) -> tuple[int, np.ndarray]:
        for offset in range(len(self)):
            candidate = (row + offset) % len(self)
            array = self._read(candidate)
            if array is not None:
                return candidate, array
        raise UserError(f"none of the {len(self)} pictures can be decoded; see `ldm encode`")


def split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, drawn from all: ids may be sorted by what they show."""
    order = random.permutation(seed, 0, count)
    held_out = min(HELD_OUT, max(1, count // 16))
    return order[held_out:] if count > 1 else order, order[:held_out]


def worker(config: dict[str, Job]) -> dict[str, Any]:
    """One Ray Train worker; returns the figures of the finished run."""
    job = config["job"]
    recipe, section = job.recipe, job.recipe.autoencoder
    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), job.device()
    pictures = Pictures(recipe)
    rows, held_out = split(len(pictures), recipe.seed)
    plan = SamplePlan(recipe.seed, len(rows), section.batch_size)

    network = new_autoencoder(
        section.block_channels,
        section.channels,
        section.layers_per_block,
        recipe.size,
        recipe.seed,
    ).to(device)
    dtype = compute_dtype(device, recipe.precision)
    optimizers = muon_and_adamw(
        network, hidden_kernels(network), section.learning_rate, 0.0, dtype, rank, world
    )
    first = 0
    if state := restore():
        network.load_state_dict(state["network"])
        optimizers.load_state_dict(state["optimizers"])
        first = state["step"]
    reconstruct = ray.train.torch.prepare_model(Reconstruction(network), move_to_device=False)
    update = TrainingStep(network, optimizers, device, dtype, clip_norm=1.0)
    latent = (section.channels, *(recipe.size // section.downsampling,) * 2)

    def read(step: int) -> tuple[Tensor, Tensor]:
        pixels, ids = pictures.batch(rows[plan.rows_at(step, rank, world)[0]])
        return pixels.to(device), random.normal(recipe.seed, "posterior", step, ids, latent)

    meter = Meter()
    batches = prefetch(read, first, section.steps)
    for step in range(first, section.steps):
        with meter.waiting():
            _, (pixels, eps) = next(batches)

        def losses(pixels: Tensor = pixels, eps: Tensor = eps) -> Tensor:
            decoded, mean, logvar = reconstruct(pixels, eps.to(device))
            return autoencoder_loss(
                pixels,
                decoded.float(),
                Posterior(mean.float(), logvar.float()),
                section.kl_weight,
                section.perceptual_weight,
            ).total

        result = update(losses, warmup_then_decay(step, section.steps, 20, 0.4))
        meter.count(section.batch_size)
        done = step + 1
        if rank == 0 and (done % 20 == 0 or done == section.steps):
            figures = meter.read()
            job.run.metrics({"loss": result.loss, "skipped": update.skipped, **figures}, done)
            job.board.post.remote(done, f"loss {result.loss:.4f}")
        if done % section.checkpoint_every == 0 and done < section.steps:
            save(
                lambda done=done: {  # type: ignore[misc]
                    "network": network.state_dict(),
                    "optimizers": optimizers.state_dict(),
                    "step": done,
                },
                {"step": done},
            )
    if rank:
        return {}
    return {**meter.mean(), **_finish(job, network, pictures, rows, held_out, device)}


def _finish(
    job: Job,
    network: Any,
    pictures: Pictures,
    rows: np.ndarray,
    held_out: np.ndarray,
    device: torch.device,
) -> dict[str, float]:
    """Measure, keep the statistics in the config where diffusers keeps them, and save."""
    autoencoder = DiffusersAutoencoder(network, "", device)
    some = rows[:STATISTICS]
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
    pixels, _ = pictures.batch(held_out)
    decoded = autoencoder.decode(autoencoder.encode(pixels).mean).cpu()
    figures = {"psnr": float(psnr(pixels, decoded).mean()), "latent_std": float(np.mean(std))}
    job.run.metrics(figures, job.recipe.autoencoder.steps)
    sheet = grid_image(np.concatenate([to_image(pixels[:16]), to_image(decoded[:16])]), columns=8)
    job.run.image(sheet, "reconstructions", job.recipe.autoencoder.steps)
    with tempfile.TemporaryDirectory(prefix="ldm-autoencoder-") as folder:
        network.save_pretrained(folder, safe_serialization=True)
        upload_folder(folder, job.product)
    return figures
