"""Pictures of fixed captions and seeds, drawn by the EMA weights as training goes on."""

import numpy as np
import torch

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.errors import UserError
from ldm_core.generation import grid_image
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.latents.reader import LatentReader
from ldm_core.media.pixels import to_image
from ldm_core.samplers.euler import sample_euler
from ldm_core.training.draws import draw
from ldm_core.training.ema import Ema
from pipelines.backbones import BackboneConfig, new_backbone
from pipelines.ray_training import Job

COUNT = 8


class TrainingPictures:
    """The same pictures again and again, as a grid of the run."""

    def __init__(
        self, job: Job, reader: LatentReader, config: BackboneConfig, device: torch.device
    ) -> None:
        self.job, self.reader, self.device = job, reader, device
        rows = np.arange(min(COUNT, len(reader)))
        self.batch = reader.batch(rows, np.zeros_like(rows), job.recipe.seed)
        entry = reader.version.manifest.autoencoder
        self.autoencoder = load_autoencoder(entry.uri, device)
        if self.autoencoder.digest != entry.digest:
            raise UserError(
                f"{entry.uri} now holds another autoencoder ({self.autoencoder.digest}) than the "
                f"one that made the latents ({entry.digest}): run `ldm encode` again"
            )
        self.network = new_backbone(config).to(device).eval()
        job.run.document(self.batch.captions, "preview-captions.json")

    @torch.no_grad()
    def log(self, ema: Ema, step: int) -> None:
        """Sample and log one grid."""
        self.network.load_state_dict(ema.state_dict())
        seed, section = self.job.recipe.seed, self.job.recipe.train
        eps = draw(seed, 0, self.batch.ids, self.reader.shape, 0.0).eps.to(self.device)
        denoiser = Denoiser(self.network, FlowProcess(), Prediction.VELOCITY)
        null = self.reader.null_condition().to(self.device)
        guided = ClassifierFreeGuidance(denoiser, section.guidance, null)
        grid = linear_grid(section.sample_steps).to(self.device)
        x0 = sample_euler(guided, eps, grid, self.batch.condition.to(self.device)).cpu()
        pictures = to_image(self.autoencoder.decode(x0 * self.reader.std + self.reader.mean).cpu())
        self.job.run.image(grid_image(pictures), "samples", step)
