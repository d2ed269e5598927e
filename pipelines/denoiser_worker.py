"""One worker of the teacher's training: reads its lanes, steps with the others, saves, hands over.

What a step learns from depends on (seed, step) alone: not on how many workers there are, how they
are laid out, or how often they had to begin again.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ldm_core.reading.stream import StreamReader
from ldm_core.training.layout import Layout
from ldm_core.training.parallel import Parallel
from ldm_core.training.prefetch import prefetch
from ldm_core.training.step import StepResult
from pipelines.backbones import BackboneConfig
from pipelines.denoiser_network import (
    arranged,
    fitting,
    model_weights,
    new_averages,
    new_update,
    rate_at,
)
from pipelines.early_stop import FEWEST, EarlyStop
from pipelines.promotion import Score
from pipelines.ray_training import Job, being_preempted, due
from pipelines.recipes.sections import TrainSection
from pipelines.system_metrics import sampled, watched_node
from pipelines.teacher_directory import save_teacher
from pipelines.teacher_loss import Sample, drawn, teacher_loss
from pipelines.training_data import READ_AHEAD, TrainingData
from pipelines.training_figures import new_figures
from pipelines.training_state import Resuming, Snapshots
from pipelines.validation import Judged, Scene, held_out_digest

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
    node = watched_node(section)
    with sampled(job.run, node), data.reader(section, job.recipe.seed) as reader:
        return DenoiserTraining(job, data, reader, layout, device).run()


def layout_for(section: TrainSection, world: int) -> Layout:
    """The recipe's layout, of as many workers as there are: fewer if machines were lost.

    What cannot be copies of the recipe's shards becomes one copy in more or fewer shards, and
    tokens are dealt out to fewer workers if need be. The section has a micro-batch for each of the
    workers that are then given samples of their own: it refuses numbers for which it has not.
    """
    shard, context = section.layout.shard, section.layout.context_of(world)
    if world % (shard * context):
        return Layout(1, world // context, context)
    return Layout.filling(world, shard, context)


class DenoiserTraining:
    """The training as one worker sees it.

    Attributes:
        last: the step it ends with, as far as is known.
    """

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
        initial = job.inputs.get("initial")
        self.parallel = arranged(job.recipe, self.config, layout, device, initial)
        self.network, self.first_worker = self.parallel.network, self.parallel.rank == 0
        self.update = new_update(job.recipe, self.parallel)
        self.averages = new_averages(self.section, self.network)
        self.resuming = Resuming(
            job,
            self.update,
            self.averages.by_name,
            architecture(self.config, reader),
            str(layout),
            max(self.section.keep_checkpoints, FEWEST if self.section.patience else 1),
        )
        self.snapshots = Snapshots(job, self.averages.by_name, architecture(self.config, reader))
        self.figures = new_figures(self.section, self.config, reader, self.parallel)
        self.watch = Watch(self.parallel)
        self.judged = Judged(job, self.scene()) if self.first_worker else None
        self.ending = EarlyStop(self.section, self.parallel, self.judged, job.checkpoints)
        self.last = self.section.steps

    def run(self) -> dict[str, Any]:
        """From the newest checkpoint to the last step."""
        for done in self.steps(self.begin()):
            self.look(done)
            self.keep(done)
        return self.finish()

    def begin(self) -> int:
        """Go back to the newest checkpoint; returns the steps done.

        Its weights are looked at again: the loss of its step may not have come in time, nor its
        pictures.
        """
        first = self.resuming.restore(self.ending.has_lacking)
        self.ending.go_on_from(first)
        if first and self.ending.comes_at(first):
            self.last = first
        self.snapshots.begin(first, self.last)
        if first:
            self.look(first)
        return first

    def steps(self, first: int) -> Iterator[int]:
        """Update and tell of it; yields how many steps are done."""
        self.figures.begin(first)
        coming = prefetch(self.read, first, self.last, READ_AHEAD)
        for step, samples in self.figures.meter.waiting_for(coming):
            result, done = self.step(step, samples), step + 1
            if self.ending.comes_at(done):
                self.last = done
            if due(done, self.section.log_every, self.last):
                self.tell(result, done)
            yield done
            if done == self.last:
                return

    def read(self, step: int) -> list[Sample]:
        """This worker's micro-batches and what is drawn for them, in a thread beside training."""
        rank, world = self.parallel.data_rank, self.parallel.layout.data_world
        pin = self.parallel.device.type == "cuda"
        return [
            drawn(self.recipe, batch.pin_memory() if pin else batch, step)
            for batch in self.reader.batches(step, rank, world)
        ]

    def step(self, step: int, samples: list[Sample]) -> StepResult:
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
        loss, pictures = self.validates_at(done), due(done, self.section.sample_every, self.last)
        if loss or pictures:
            self.judge(done, loss, pictures)

    def validates_at(self, done: int) -> bool:
        """Whether the loss on held-out rows is asked for after `done` steps."""
        wanted = bool(self.section.validation_samples)
        return wanted and due(done, self.section.validate_every, self.last)

    def judge(self, done: int, loss: bool, pictures: bool) -> None:
        """Hand the averaged weights over. The last ones' loss is the model's."""
        needed = loss and (self.section.patience is not None or done == self.last)
        if loss:
            self.ending.asked(done)
        if not needed and not self.is_taken(done):
            return
        weights, _ = model_weights(self.section, self.network, self.averages, self.first_worker)
        if self.judged:
            self.judged.hand_over(weights, done, loss, pictures, needed)

    def is_taken(self, done: int) -> bool:
        """Whether whoever judges has room: asked before all workers gather the whole weights."""
        return bool(self.parallel.most(int(self.judged is not None and self.judged.takes(done))))

    def keep(self, done: int) -> None:
        """Save what training can go on from, if it is time to."""
        self.snapshots.keep(done, self.last)
        now = due(done, self.section.checkpoint_every, self.last)  # and if writing the model fails
        if not now and not self.watch.says_save():
            return
        self.resuming.save(done, self.ending.facts(done))
        if not now and self.watch.warned:  # else it is written while training goes on
            self.resuming.wait()
        self.ending.keep(done)  # last: a machine that is about to go waits for no validation

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
        self.snapshots.wait(self.last)
        weights, adapters = model_weights(
            self.section, self.network, self.averages, self.first_worker
        )
        if not self.judged:
            return {}
        parameters = sum(weight.numel() for weight in self.network.parameters())
        summary: dict[str, Any] = {"steps": self.last, "parameters": parameters}
        if self.last < self.section.steps:
            summary["ended"] = self.ending.reason(self.last)
        statistics = self.reader.statistics
        version, shapes = self.data.version, self.reader.shapes
        digest = save_teacher(
            self.done(), version, self.config, statistics, weights, shapes, adapters
        )
        self.judged.wait()
        summary |= self.validated()
        return {**summary, **self.figures.meter.mean(), "digest": digest}

    def done(self) -> Job:
        """The job with the steps that were done, for the model's card."""
        train = self.section.model_copy(update={"steps": self.last})
        return replace(self.job, recipe=self.recipe.model_copy(update={"train": train}))

    def validated(self) -> dict[str, Any]:
        """The model's validation loss and what it was measured on; nothing if it is not known."""
        rows = self.data.held_out
        if not self.judged or rows is None or self.last not in self.judged.losses:
            return {}
        on_gpu = bool(self.section.validation_gpus)
        digest = held_out_digest(rows, self.reader.statistics, self.recipe.seed, on_gpu)
        return Score(self.judged.losses[self.last], rows.manifest.content, digest).facts()


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
