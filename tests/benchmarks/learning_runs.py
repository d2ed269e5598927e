"""The trainings of `bench_learning.py`: a recipe's with one thing changed, in one process.

The pieces are those of `ldm train`: reader, draws, network, optimisers, schedule, averages.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition, drop_captions
from ldm_core.diffusion.denoiser import Network
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.diffusion.timesteps import logit_normal, shift_timesteps
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.objectives import weightings
from ldm_core.objectives.denoising import denoising_loss
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.training.averages import Averages
from ldm_core.training.ema import Ema
from ldm_core.training.layout import Layout
from ldm_core.training.parallel import Parallel
from ldm_core.training.power_ema import PowerEma
from ldm_core.training.prefetch import prefetch
from pipelines.backbones import BackboneConfig
from pipelines.denoiser_network import arranged, fitting, new_update, power_name, rate_at
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection
from pipelines.teacher_loss import Sample, drawn, teacher_loss
from pipelines.training_data import READ_AHEAD, TrainingData

CPU = torch.device("cpu")
DECAYS, LENGTHS = (0.99, 0.999), (0.05, 0.1)  # of averages, besides the recipe's own
RAW = "raw"  # the weights themselves
ENDLESS = 10**9  # steps

Loss = Callable[[Recipe, Network, TextCondition, Sample], Tensor]
"""(recipe, network, empty caption, micro-batch and its draws) -> (B,)."""


def recipe_loss(recipe: Recipe, model: Network, null: TextCondition, sample: Sample) -> Tensor:
    """What `ldm train` computes: velocities at logit-normal times."""
    return teacher_loss(recipe, model, null, None, sample)


def uniform_loss(
    shift: bool, recipe: Recipe, model: Network, null: TextCondition, sample: Sample
) -> Tensor:
    """The same at times spread evenly, or evenly and then shifted as the recipe's are."""
    u, latents = sample.draws.u, sample.batch.latents
    t = shift_timesteps(u, recipe.train.timestep_shift) if shift else u
    return flow_matching_loss(model, latents, sample.draws.eps, t, heard(null, sample))


def x0_loss(
    weighting: weightings.Weighting,
    recipe: Recipe,
    model: Network,
    null: TextCondition,
    sample: Sample,
) -> Tensor:
    """Errors in x0 at the recipe's times, weighted."""
    section, latents = recipe.train, sample.batch.latents
    t = logit_normal(
        sample.draws.u, section.timestep_mean, section.timestep_std, section.timestep_shift
    )
    told = (latents, sample.draws.eps, t, heard(null, sample), weighting)
    return denoising_loss(model, FlowProcess(), Prediction.X0, *told)


def heard(null: TextCondition, sample: Sample) -> TextCondition:
    """The captions, some of them dropped."""
    return drop_captions(sample.batch.condition, null, sample.draws.drop)


@dataclass(frozen=True)
class Variant:
    """A recipe's training with one thing changed.

    Attributes:
        section: fields of the train section.
        loss: of a micro-batch.
        prediction: what the network's output then means.
    """

    section: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = recipe_loss
    prediction: Prediction = Prediction.VELOCITY


X0 = Prediction.X0
VARIANTS = {
    "default": Variant(),
    "adamw": Variant({"optimizer": "adamw"}),
    "uniform": Variant(loss=partial(uniform_loss, False)),
    "no-qk-norm": Variant({"qk_norm": False}),
    "x0": Variant(loss=partial(x0_loss, weightings.flow), prediction=X0),
    "compile": Variant({"compile": True}),
    "adamw-slower": Variant({"optimizer": "adamw", "learning_rate": 2e-3}),
    "uniform-shifted": Variant(loss=partial(uniform_loss, True)),
    "x0-unweighted": Variant(loss=partial(x0_loss, weightings.uniform), prediction=X0),
}
"""A Muon step is scaled to AdamW's, so `adamw` has its rate; `adamw-slower` is the usual one."""


@dataclass(frozen=True)
class Budget:
    """How long a variant is trained: minutes, or steps."""

    minutes: float | None = None
    steps: int | None = None

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps else f"{self.minutes:g} min"

    def progress(self, done: int, seconds: float) -> float:
        """The share that `done` steps in so many seconds are."""
        return done / self.steps if self.steps else seconds / (60 * (self.minutes or 0))


def rate(section: TrainSection, done: int, progress: float) -> float:
    """The recipe's multiplier of the learning rate, `progress` through a run, after `done` steps.

    That of a run of done / progress steps; the warm-up is counted in steps of its own.
    """
    steps = max(round(done / progress), done + 1) if progress else ENDLESS
    return rate_at(section.model_copy(update={"steps": steps}), done)


@dataclass(frozen=True)
class Trained:
    """What came of a training.

    Attributes:
        config: of the network.
        statistics: by which its latents are normalised.
        weights: by the average's name; "raw" are the weights themselves.
        seconds: of each step, waiting for data included.
        skipped: steps without an update, as their gradients were not finite.
    """

    config: BackboneConfig
    statistics: LatentStatistics
    weights: Mapping[str, Mapping[str, Tensor]]
    seconds: np.ndarray
    skipped: int


def changed(recipe: Recipe, variant: Variant) -> Recipe:
    """The recipe of a variant."""
    section = recipe.train.model_copy(update=dict(variant.section))
    return recipe.model_copy(update={"train": section})


def new_averages(section: TrainSection, parallel: Parallel) -> Averages:
    """The recipe's own, and those that are compared."""
    decays = dict.fromkeys((section.ema_decay, *DECAYS))
    averages: dict[str, Any] = {average_name(d): Ema(parallel.network, d) for d in decays}
    return Averages(averages | {power_name(s): PowerEma(parallel.network, s) for s in LENGTHS})


def average_name(decay: float) -> str:
    """Of an exponential average."""
    return f"{decay:g}"


def train(recipe: Recipe, data: TrainingData, variant: Variant, budget: Budget) -> Trained:
    """Train a variant from scratch; compiling counts, as whoever trains waits for it.

    Raises:
        UserError: step after step without a finite gradient.
    """
    recipe = changed(recipe, variant)
    section = recipe.train
    with data.reader(section, recipe.seed) as reader:
        config = fitting(section, reader, data.main)
        parallel = arranged(recipe, config, Layout(), CPU)
        update, averages = new_update(recipe, parallel), new_averages(section, parallel)
        loss = partial(variant.loss, recipe, parallel.model, reader.null_condition())

        def read(step: int) -> list[Sample]:
            return [drawn(recipe, batch, step) for batch in reader.batches(step)]

        ticks, told = [time.monotonic()], 0.0
        with closing(prefetch(read, 0, ENDLESS, READ_AHEAD)) as coming:
            for step, samples in coming:
                progress = budget.progress(step, time.monotonic() - ticks[0])
                if progress >= 1:
                    break
                losses = [partial(loss, sample) for sample in samples]
                result = update(losses, rate(section, step, progress), reader.count_at(step))
                averages.update(parallel.network)
                ticks.append(time.monotonic())
                if progress >= told:
                    print(f"  {progress:4.0%}  step {step}, loss {result.loss:.3f}", flush=True)
                    told += 0.1
    weights = {name: average.state_dict() for name, average in averages.by_name.items()}
    weights = {RAW: parallel.network.state_dict(), **weights}
    return Trained(config, reader.statistics, weights, np.diff(ticks), update.skipped)
