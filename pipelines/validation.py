"""Validation beside training: averaged weights are handed over, and training does not wait.

An actor of its own has a copy of the network. It finds the loss on held-out rows, at fixed times
with fixed noise, and draws pictures of fixed captions and seeds. The training worker tells the run
of them, so that no loss waits for the tracking server.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import ray
import ray.exceptions
import torch
from torch import Tensor

from ldm_core.autoencoders.autoencoder import Autoencoder, load_autoencoder
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.errors import UserError
from ldm_core.generation import grid_image
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.latents.manifest import EncoderEntry, LatentStatistics
from ldm_core.latents.reader import LatentBatch
from ldm_core.media.pixels import to_image
from ldm_core.reading.index import StoreIndex
from ldm_core.reading.stream import StreamReader
from ldm_core.samplers.euler import sample_euler
from ldm_core.training.draws import draw
from ldm_core.training.loss_by_time import HeldOut, validation_loss
from ldm_core.training.step import autocast, compute_dtype
from pipelines.backbones import BackboneConfig, new_backbone
from pipelines.ray_training import CAUSE_LENGTH, Job
from pipelines.tracking import Run
from pipelines.training_data import tokens_of

MOST_WAITING = 2  # sets of weights; with more, the next is left out
MOST_TRIES = 3  # at a loss that is needed
ROOM_S = 10.0  # between tries to find room for weights: no worker waits for long in silence
LAST_S = 600.0  # that the end of a training waits for what is not judged yet
NEEDED_S = 6 * 3600.0  # and for the loss of the model itself
VALIDATION_LOSS = "validation_loss"


@dataclass(frozen=True)
class Scene:
    """What a validation looks at, besides the weights.

    Attributes:
        backbone: of the network.
        pictures: captions that are drawn, the same every time.
        null: the empty caption.
        autoencoder: that decodes.
        statistics: by which latents are normalised.
        held_out: rows for the loss; None is no loss.
        budget: tokens of a batch of them.
    """

    backbone: BackboneConfig
    pictures: LatentBatch
    null: TextCondition
    autoencoder: EncoderEntry
    statistics: LatentStatistics
    held_out: StoreIndex | None
    budget: int


@dataclass(frozen=True)
class Pictures:
    """What weights draw.

    Attributes:
        sheet: all of them, (H, W, 3) uint8.
        captions: of each.
    """

    sheet: np.ndarray
    captions: list[str]

    def tell(self, run: Run, step: int) -> None:
        """Show the run what was drawn after `step` steps."""
        run.document(self.captions, "preview-captions.json")
        run.image(self.sheet, "samples", step)


def held_out_digest(
    rows: StoreIndex, statistics: LatentStatistics, seed: int, on_gpu: bool = False
) -> str:
    """16 hex digits of what a validation loss is measured on, of one content of the store.

    Args:
        rows: held out.
        statistics: by which they are normalised.
        seed: of their noise.
        on_gpu: where losses are computed in 16 bits, perhaps: they compare with their like alone.
    """
    text = f"{rows.samples.digest} {statistics.model_dump_json()} {seed}{' gpu' * on_gpu}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Validator:
    """Judges one set of weights after another; on a CPU with as many threads as a worker has."""

    def __init__(self, job: Job, scene: Scene, device: str) -> None:
        self.job, self.scene, self.device = job, scene, torch.device(device)
        if self.device.type == "cpu":
            torch.set_num_threads(job.workers.threads)
        network = new_backbone(scene.backbone).to(self.device).eval()
        self.network = network.requires_grad_(False)  # or autocast would keep its 16-bit weights

    def loss(self, weights: dict[str, Tensor], step: int) -> dict[str, float]:
        """Of weights after `step` steps on the held-out rows: the mean, and by time."""
        self.network.load_state_dict(weights)
        with self._autocast():
            found = validation_loss(self.network, self._rows(), self.job.recipe.seed)
        mean = found.pop("mean")
        by_time = {f"{VALIDATION_LOSS}/{bin}": value for bin, value in found.items()}
        return {VALIDATION_LOSS: mean, **by_time}

    @torch.no_grad()
    def show(self, weights: dict[str, Tensor], step: int) -> Pictures:
        """What weights draw after `step` steps; of videos, the middle frames."""
        self.network.load_state_dict(weights)
        section, batch, device = self.job.recipe.train, self.scene.pictures, self.device
        shape = tuple(batch.latents.shape[1:])
        eps = draw(self.job.recipe.seed, 0, batch.ids, shape, 0.0).eps.to(device)
        denoiser = Denoiser(self.network, FlowProcess(), Prediction.VELOCITY)
        guided = ClassifierFreeGuidance(denoiser, section.guidance, self.scene.null.to(device))
        grid = linear_grid(section.sample_steps).to(device)
        with self._autocast():
            x0 = sample_euler(guided, eps, grid, batch.condition.to(device)).float().cpu()
        view = (-1, *(1 for _ in shape[1:]))
        mean, std = (
            torch.tensor(each).view(view)
            for each in (self.scene.statistics.mean, self.scene.statistics.std)
        )
        pixels = self._autoencoder.decode(x0 * std + mean).cpu()
        pictures = to_image(pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2])
        return Pictures(grid_image(pictures), batch.captions)

    def _autocast(self) -> AbstractContextManager[None]:
        """As it is trained, on a GPU, where float32 would take ten times as long."""
        if self.device.type == "cpu":
            return nullcontext()
        return autocast(self.device, compute_dtype(self.device, self.job.recipe.precision))

    def _rows(self) -> Iterator[HeldOut]:
        scene = self.scene
        assert scene.held_out is not None
        shapes, patch = scene.held_out.samples.shapes, self.job.recipe.train.patch_size
        with StreamReader(
            [scene.held_out],
            seed=self.job.recipe.seed,
            lanes=1,
            budget=scene.budget,
            tokens=lambda bucket: tokens_of(shapes[bucket], patch),
            statistics=scene.statistics,
        ) as reader:
            for step in reader.order.steps(0):
                for batch in reader.batches(step, epoch=0):
                    latents, cond = batch.latents.to(self.device), batch.condition.to(self.device)
                    yield HeldOut(latents, cond, batch.ids)

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        entry = self.scene.autoencoder
        found = load_autoencoder(entry.uri, self.device)
        if found.digest != entry.digest:
            raise UserError(
                f"{entry.uri} now holds another autoencoder ({found.digest}) than the one that "
                f"made the latents ({entry.digest}): run `ldm encode` again"
            )
        return found


@dataclass(frozen=True)
class _Asked:
    """Weights that are being judged.

    Attributes:
        weights: where they lie: they outlive an actor that dies over them.
        what: of a validator's methods.
        needed: whether it is tried again if it fails.
        actor: whom they were handed to.
    """

    weights: Any
    step: int
    what: Literal["loss", "show"]
    needed: bool
    actor: Any = None
    tries: int = 0


class Judged:
    """The training worker's side: hands weights over, and does not wait for what is not needed.

    A validation that fails is told and counted. One that is needed is tried again.

    Attributes:
        losses: what is known of them, by step.
        given_up: why there is none of a step that one is needed of.
    """

    def __init__(self, job: Job, scene: Scene) -> None:
        self.job, self.scene = job, scene
        self.losses: dict[int, float] = {}
        self.given_up: dict[int, str] = {}
        self._waiting: dict[Any, _Asked] = {}
        self.skipped = self.failed = 0
        self._actor = self._begin()

    def _begin(self) -> Any:
        gpus = self.job.recipe.train.validation_gpus
        actor: Any = ray.remote(num_cpus=0, num_gpus=gpus)(Validator)
        return actor.remote(self.job, self.scene, "cuda" if gpus else "cpu")

    def takes(self, step: int) -> bool:
        """Whether weights are taken whose loss is not needed: not while two sets wait. That those
        of a step are left out is told and counted.
        """
        self.collect(0)
        if len({asked.step for asked in self._waiting.values()}) < MOST_WAITING:
            return True
        self.skipped += 1
        line = f"validation is behind: the weights of step {step} are left out"
        self.job.warn(line, kind="validation is behind")
        self.job.run.metrics({"skipped_validations": self.skipped}, step)
        return False

    def hand_over(
        self, weights: dict[str, Tensor], step: int, loss: bool, pictures: bool, needed: bool
    ) -> None:
        """Have weights judged; that there is no room for them is told and counted."""
        kept = self._put(weights, step, needed)
        if kept is None:
            return
        if loss:
            self._ask(_Asked(kept, step, "loss", needed))
        if pictures:
            self._ask(_Asked(kept, step, "show", needed=False))

    def collect(self, seconds: float) -> None:
        """Hear of what is done; if nothing is, wait so long for something."""
        if not self._waiting:
            return
        ray.wait([*self._waiting], num_returns=1, timeout=seconds)
        done, _ = ray.wait([*self._waiting], num_returns=len(self._waiting), timeout=0)
        for each in done:
            asked = self._waiting.pop(each)
            try:
                found = ray.get(each)
            except ray.exceptions.RayError as error:
                self._failed(asked, error)
            else:
                self._tell(asked.step, found)

    def wait(self) -> None:
        """Until all that was handed over is judged: for ten minutes, or hours where the model's own
        loss is not known yet.
        """
        begin = time.monotonic()
        self._wait(lambda: bool(self._waiting))
        while self._needs() and time.monotonic() - begin < NEEDED_S:
            self.job.warn("waiting for the validation loss of the model that was trained")
            self._wait(self._needs)
        if self._waiting:
            self.job.warn(f"{len(self._waiting)} validations were not done and are given up")

    def _needs(self) -> bool:
        return any(asked.needed for asked in self._waiting.values())

    def _wait(self, more: Callable[[], bool]) -> None:
        """For ten minutes at most, while there is `more` to wait for."""
        end = time.monotonic() + LAST_S
        while more():
            self.collect(max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                return

    def _put(self, weights: dict[str, Tensor], step: int, needed: bool) -> Any:
        """Where weights lie; None if nowhere, as the object store and its disk may be full."""
        cause = ""
        for seconds in (0.0, *[ROOM_S] * (MOST_TRIES - 1 if needed else 0)):
            self.collect(seconds)  # what is judged meanwhile makes room
            try:
                return ray.put(weights)
            except ray.exceptions.RayError as error:
                cause = self._count(error)
        if needed:
            self.given_up[step] = cause
        return None

    def _ask(self, what: _Asked) -> None:
        asked = replace(what, actor=self._actor, tries=what.tries + 1)
        method = getattr(self._actor, asked.what)
        self._waiting[method.remote(asked.weights, asked.step)] = asked

    def _tell(self, step: int, found: dict[str, float] | Pictures) -> None:
        if isinstance(found, Pictures):
            found.tell(self.job.run, step)
            return
        self.losses[step] = found[VALIDATION_LOSS]
        self.job.run.metrics(found, step)

    def _failed(self, asked: _Asked, error: Exception) -> None:
        cause = self._count(error)
        if isinstance(error, ray.exceptions.RayActorError) and asked.actor is self._actor:
            self._actor = self._begin()
        if asked.needed and asked.tries < MOST_TRIES:
            self._ask(asked)
        elif asked.needed:
            self.given_up[asked.step] = cause

    def _count(self, error: Exception) -> str:
        """Tell of a failure; returns its cause."""
        self.failed += 1
        cause = str(getattr(error, "cause", None) or error)
        self.job.warn(f"a validation failed: {cause}", kind="a validation failed")
        self.job.run.tags({f"validation_failure.{self.failed}": cause[-CAUSE_LENGTH:]})
        return cause
