"""One worker of the teacher's training: reads its lanes, steps with the others, saves, hands over.

What a step learns from depends on (seed, step) alone: not on how many workers there are, how they
are laid out, or how often they had to begin again.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition, drop_captions
from ldm_core.diffusion.denoiser import Network
from ldm_core.diffusion.timesteps import logit_normal
from ldm_core.latents.reader import LatentBatch
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.reading.stream import StreamReader
from ldm_core.training.draws import Draws, draw
from ldm_core.training.layout import Layout
from ldm_core.training.loss_by_time import LossByTime
from ldm_core.training.parallel import Parallel
from ldm_core.training.prefetch import prefetch
from ldm_core.training.shards import whole_weights
from ldm_core.training.step import StepResult
from pipelines.backbones import BackboneConfig
from pipelines.denoiser_network import (
    MODEL,
    arranged,
    fitting,
    new_averages,
    new_update,
    rate_at,
)
from pipelines.ray_training import Job, being_preempted, due
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection
from pipelines.teacher_directory import save_teacher
from pipelines.training_data import READ_AHEAD, TrainingData
from pipelines.training_figures import new_figures
from pipelines.training_state import Resuming, Snapshots
from pipelines.validation import Judged, Scene

PICTURES = 8
ASK_S = 10  # between questions whether a machine is about to go
SAVE_TICKS = 60  # of these questions: ten minutes, however long a step takes


def denoiser_worker(data: TrainingData, config: dict[str, Job]) -> dict[str, Any]:
    """Train to the end.

    Returns:
        Of the first worker: figures of the finished run, and the model's digest.
    """
    job = config["job"]
    section = job.recipe.train
    _, world, device = job.place()
    layout = layout_for(section, world)
    with data.reader(section, job.recipe.seed) as reader:
        return DenoiserTraining(job, data, reader, layout, device).run()


def layout_for(section: TrainSection, world: int) -> Layout:
    """The recipe's layout, of as many workers as there are: fewer if machines were lost.

    What cannot be copies of the recipe's shards becomes one copy in more or fewer shards, and
    tokens are dealt out to fewer workers if need be.
    """
    shard, context = section.layout.shard, math.gcd(world, section.layout.context)
    if world % (shard * context):
        return Layout(1, world // context, context)
    return Layout.filling(world, shard, context)


class DenoiserTraining:
    """The training as one worker sees it."""

    def __init__(
        self,
        job: Job,
        data: TrainingData,
        reader: StreamReader,
        layout: Layout,
        device: torch.device,
    ) -> None:
        self.job, self.data, self.recipe, self.section = job, data, job.recipe, job.recipe.train
        self.reader, self.null = reader, reader.null_condition().to(device)
        self.config = fitting(self.section, reader, data.main)
        self.parallel = arranged(job.recipe, self.config, layout, device)
        self.network, self.first_worker = self.parallel.network, self.parallel.rank == 0
        self.update = new_update(job.recipe, self.parallel)
        self.averages = new_averages(self.section, self.network)
        self.resuming = Resuming(
            job,
            self.update,
            self.averages.by_name,
            architecture(self.config, reader),
            str(layout),
            self.section.keep_checkpoints,
        )
        self.snapshots = Snapshots(job, self.averages.by_name, architecture(self.config, reader))
        self.figures = new_figures(self.section, self.config, reader, self.parallel)
        self.watch = Watch(self.parallel)
        self.judged = Judged(job, self.scene()) if self.first_worker else None

    def run(self) -> dict[str, Any]:
        """From the newest checkpoint to the last step."""
        steps, every = self.section.steps, self.section.checkpoint_every
        for done in self.steps(self.resuming.restore()):
            self.look(done)
            if due(done, every, steps):  # at the end too: writing the model may fail
                self.resuming.save(done)
                self.snapshots.save(done)
            elif self.watch.says_save():
                self.resuming.save(done)
                if self.watch.warned:  # else it is written while training goes on
                    self.resuming.wait()
        return self.finish()

    def steps(self, first: int) -> Iterator[int]:
        """Update and tell of it; yields how many steps are done."""
        self.figures.begin(first)
        coming = prefetch(self.read, first, self.section.steps, READ_AHEAD)
        for step, samples in self.figures.meter.waiting_for(coming):
            result = self.step(step, samples)
            if due(step + 1, self.section.log_every, self.section.steps):
                self.tell(result, step + 1)
            yield step + 1

    def read(self, step: int) -> list["Sample"]:
        """This worker's micro-batches and what is drawn for them, in a thread beside training."""
        rank, world = self.parallel.data_rank, self.parallel.layout.data_world
        pin = self.parallel.device.type == "cuda"
        return [
            drawn(self.recipe, batch.pin_memory() if pin else batch, step)
            for batch in self.reader.batches(step, rank, world)
        ]

    def step(self, step: int, samples: list["Sample"]) -> StepResult:
        """One update of all workers."""
        loss = partial(teacher_loss, self.recipe, self.parallel.model, self.null)
        total = self.reader.count_at(step)
        passes = -(-self.reader.lanes // self.parallel.layout.data_world)
        losses = [partial(loss, self.figures.by_time, sample) for sample in samples]
        spare = partial(loss, None, samples[-1])  # beside workers that have one more
        result = self.update(losses, rate_at(self.section, step), total, passes, spare)
        self.averages.update(self.network)
        self.figures.count([sample.batch for sample in samples], total)
        return result

    def tell(self, result: StepResult, done: int) -> None:
        """Log the figures since the last time."""
        epoch, share = self.reader.order.position(done)
        told = self.figures.read(done) | {
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": self.section.learning_rate * rate_at(self.section, done - 1),
            "epoch": epoch + share,
            "skipped_steps": self.update.skipped,
        }
        if self.first_worker:
            self.job.log(done, told, f"loss {result.loss:.4f}")

    def look(self, done: int) -> None:
        """Have the averaged weights validated beside training."""
        section, steps = self.section, self.section.steps
        loss = bool(section.validation_samples) and due(done, section.validate_every, steps)
        pictures = due(done, section.sample_every, steps)
        if loss or pictures:
            weights = whole_weights(self.averages[MODEL].state_dict(), keep=self.first_worker)
            if self.judged:
                self.judged.hand_over(weights, done, loss, pictures)

    def scene(self) -> Scene:
        """What validations look at: some captions of the store, and the held-out rows."""
        return Scene(
            backbone=self.config,
            pictures=self.reader.first(PICTURES),
            null=self.reader.null_condition(),
            autoencoder=self.data.version.manifest.autoencoder,
            statistics=self.reader.statistics,
            held_out=self.data.held_out,
            budget=self.data.budget(self.section),
        )

    def finish(self) -> dict[str, Any]:
        """The first worker writes the model and tells of it; then what is under way is waited
        for."""
        self.resuming.wait()
        self.snapshots.wait()
        weights = whole_weights(self.averages[MODEL].state_dict(), keep=self.first_worker)
        if not self.judged:
            return {}
        parameters = sum(weight.numel() for weight in self.network.parameters())
        summary = {"steps": self.section.steps, "parameters": parameters}
        statistics = self.reader.statistics
        version, shapes = self.data.version, self.reader.shapes
        digest = save_teacher(self.job, version, self.config, statistics, weights, shapes)
        self.judged.wait()
        return {**summary, **self.figures.meter.mean(), "digest": digest}


def architecture(config: BackboneConfig, reader: StreamReader) -> dict[str, Any]:
    """What a checkpoint is of: the network, and the order in which samples come."""
    name = type(config).__name__.removesuffix("Config")
    return {"class": name, **config.model_dump(mode="json"), "order": reader.digest}


class Watch:
    """Says when to save out of turn: a machine is about to go, or much time has passed.

    Workers ask together, every ten seconds of the slowest clock, and so answer alike.

    Attributes:
        warned: whether a machine was about to go when it was asked last.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.parallel, self.ticks = parallel, 0
        self.asked = time.monotonic()
        self.warned = False

    def says_save(self) -> bool:
        """Whether to save now."""
        if not self.parallel.most(int(time.monotonic() - self.asked > ASK_S)):
            return False
        self.asked = time.monotonic()
        self.ticks += 1
        going = being_preempted()
        new, self.warned = going and not self.warned, going
        return new or self.ticks % SAVE_TICKS == 0


@dataclass(frozen=True)
class Sample:
    """A micro-batch and what is drawn for it at its step."""

    batch: LatentBatch
    draws: Draws


def drawn(recipe: Recipe, batch: LatentBatch, step: int) -> Sample:
    """The draws are functions of seed, step and sample."""
    shape, drop = tuple(batch.latents.shape[1:]), recipe.train.caption_drop
    return Sample(batch, draw(recipe.seed, step, batch.ids, shape, drop))


def teacher_loss(
    recipe: Recipe,
    model: Network,
    null: TextCondition,
    by_time: LossByTime | None,
    sample: Sample,
) -> Tensor:
    """Flow matching of a micro-batch, (B,), with some of its captions dropped.

    `by_time` is told, unless the losses count nothing.
    """
    section, device = recipe.train, null.tokens.device
    batch, draws = sample.batch, sample.draws
    t = logit_normal(
        draws.u, section.timestep_mean, section.timestep_std, section.timestep_shift
    ).to(device)
    cond = drop_captions(batch.condition.to(device), null, draws.drop.to(device))
    losses = flow_matching_loss(model, batch.latents.to(device), draws.eps.to(device), t, cond)
    if by_time is not None:
        by_time.add(t, losses)
    return losses
