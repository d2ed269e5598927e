"""Validation beside training: averaged weights are handed over, and training does not wait.

An actor of its own has a copy of the network. It tells the run the loss on held-out rows, at fixed
times with fixed noise, and draws pictures of fixed captions and seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
from pipelines.backbones import BackboneConfig, new_backbone
from pipelines.ray_training import CAUSE_LENGTH, Job
from pipelines.training_data import tokens_of

MOST_WAITING = 2  # sets of weights; with more, the next is left out
LAST_S = 600  # that the end of a training waits for what is not judged yet


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


class Validator:
    """Judges one set of weights after another."""

    def __init__(self, job: Job, scene: Scene, device: str) -> None:
        self.job, self.scene, self.device = job, scene, torch.device(device)
        self.network = new_backbone(scene.backbone).to(self.device).eval()
        job.run.document(scene.pictures.captions, "preview-captions.json")

    def judge(self, weights: dict[str, Tensor], step: int, loss: bool, pictures: bool) -> int:
        """Tell the run what weights are worth after `step` steps; returns the step."""
        self.network.load_state_dict(weights)
        if loss and self.scene.held_out is not None:
            found = validation_loss(self.network, self._rows(), self.job.recipe.seed)
            figures = {"validation_loss": found.pop("mean")}
            figures |= {f"validation_loss/{bin}": value for bin, value in found.items()}
            self.job.run.metrics(figures, step)
        if pictures:
            self._draw(step)
        return step

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

    @torch.no_grad()
    def _draw(self, step: int) -> None:
        """Of videos, the middle frames."""
        section, batch, device = self.job.recipe.train, self.scene.pictures, self.device
        shape = tuple(batch.latents.shape[1:])
        eps = draw(self.job.recipe.seed, 0, batch.ids, shape, 0.0).eps.to(device)
        denoiser = Denoiser(self.network, FlowProcess(), Prediction.VELOCITY)
        guided = ClassifierFreeGuidance(denoiser, section.guidance, self.scene.null.to(device))
        grid = linear_grid(section.sample_steps).to(device)
        x0 = sample_euler(guided, eps, grid, batch.condition.to(device)).cpu()
        view = (-1, *(1 for _ in shape[1:]))
        mean, std = (
            torch.tensor(each).view(view)
            for each in (self.scene.statistics.mean, self.scene.statistics.std)
        )
        pixels = self._autoencoder.decode(x0 * std + mean).cpu()
        pictures = to_image(pixels if pixels.ndim == 4 else pixels[:, :, pixels.shape[2] // 2])
        self.job.run.image(grid_image(pictures), "samples", step)

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


class Judged:
    """The training worker's side: hands weights over, and never waits but at the end.

    A validation that fails is told and counted; training goes on without it.
    """

    def __init__(self, job: Job, scene: Scene) -> None:
        self.job, self.scene = job, scene
        self._waiting: list[Any] = []
        self.skipped = self.failed = 0
        self._actor = self._begin()

    def _begin(self) -> Any:
        gpus = self.job.recipe.train.validation_gpus
        actor: Any = ray.remote(num_cpus=0, num_gpus=gpus)(Validator)
        return actor.remote(self.job, self.scene, "cuda" if gpus else "cpu")

    def hand_over(self, weights: dict[str, Tensor], step: int, loss: bool, pictures: bool) -> None:
        """Have weights judged, unless two sets wait already."""
        self._collect(0)
        if len(self._waiting) >= MOST_WAITING:
            self.skipped += 1
            print(f"validation is behind: the weights of step {step} are left out", flush=True)
            self.job.run.metrics({"skipped_validations": self.skipped}, step)
            return
        self._waiting.append(self._actor.judge.remote(weights, step, loss, pictures))

    def wait(self) -> None:
        """Until all that was handed over is judged, or for ten minutes."""
        self._collect(LAST_S)
        if self._waiting:
            print(f"{len(self._waiting)} validations were not done in {LAST_S} s", flush=True)

    def _collect(self, seconds: float) -> None:
        """Hear of what is done."""
        if not self._waiting:
            return
        count = len(self._waiting)
        done, self._waiting = ray.wait(self._waiting, num_returns=count, timeout=seconds)
        for each in done:
            try:
                ray.get(each)
            except ray.exceptions.RayError as error:
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        self.failed += 1
        cause = getattr(error, "cause", None) or error
        print(f"a validation failed: {cause}", flush=True)
        self.job.run.tags({f"validation_failure.{self.failed}": str(cause)[-CAUSE_LENGTH:]})
        if isinstance(error, ray.exceptions.RayActorError):
            self._actor = self._begin()
