"""Prompts to pictures with a model directory: text encoders, sampler, autoencoder in one object.

A picture depends on its own request alone: its noise comes from its seed, and neighbours in a batch
only share the arithmetic.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ldm_core import random
from ldm_core.autoencoders.autoencoder import Autoencoder, load_autoencoder
from ldm_core.backbones.build import Backbone
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Denoiser, DenoiserLike
from ldm_core.diffusion.flow_map import FlowMap
from ldm_core.diffusion.grids import linear_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.errors import UserError
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.latents.stored import made_by
from ldm_core.media.pixels import to_image
from ldm_core.model_directory import ModelConfig, Reference, load_model
from ldm_core.samplers.choice import SamplerChoice
from ldm_core.samplers.events import OnStep
from ldm_core.samplers.flow_map import sample_flow_map
from ldm_core.text.encoders import TextEncoder, load_clip
from ldm_core.text.token_encoders import load_tokens

MAX_STEPS = 1000
DEFAULT_SAMPLER = SamplerChoice("euler")


@dataclass(frozen=True)
class PictureRequest:
    """One picture: same request, same model, same picture.

    Attributes:
        prompt: any text; the empty one draws an unconditional picture.
        seed: of the noise, 0 <= seed < 2^63.
        steps: of the grid, an evaluation each with most samplers; None takes the model's default.
        guidance: scale w of D_u + w (D_c - D_u); None takes the model's default.
        sampler: of a teacher; None is Euler's method. A student leaps by its own map.
    """

    prompt: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    sampler: SamplerChoice | None = None


class PictureGenerator:
    """A loaded model with the encoders it was trained with.

    Attributes:
        uri, digest: which model this is.
        kind: "teacher" or "student".
        size: side of its square pictures, pixels.
        default_steps, default_guidance: where a request names none.
        lineage: what the model was made of.
    """

    def __init__(
        self,
        uri: str,
        digest: str,
        config: ModelConfig,
        network: Backbone,
        autoencoder: Autoencoder,
        encoders: tuple[TextEncoder, TextEncoder],
        device: str | torch.device,
    ) -> None:
        self.uri, self.digest, self.config = uri, digest, config
        self.kind = config.kind
        self.size = int(config.sizes[0].split("x")[0])
        self.default_steps, self.default_guidance = config.steps, config.guidance
        self.lineage = config.lineage
        self.device = torch.device(device)
        self.network = network.to(device).requires_grad_(False)
        self.autoencoder, self.encoders = autoencoder, encoders
        shape = (-1, 1, 1)
        self._mean = torch.tensor(config.latents_mean).view(shape)
        self._std = torch.tensor(config.latents_std).view(shape)

    @classmethod
    def load(cls, uri: str, device: str | torch.device = "cpu") -> "PictureGenerator":
        """Load a model directory and what it refers to.

        Raises:
            UserError: something is missing, or an encoder is not the one the model knows.
        """
        config, network, digest = load_model(uri)
        autoencoder = load_autoencoder(config.autoencoder.uri, device)
        t5 = load_tokens(config.t5.uri, config.max_tokens, device)
        clip = load_clip(config.clip.uri, config.max_tokens, device)
        found = {"autoencoder": autoencoder.digest, "t5": t5.digest, "clip": clip.digest}
        for name, present in found.items():
            expected: Reference = getattr(config, name)
            if present != made_by(expected.digest):
                raise UserError(
                    f"{uri} was trained with {name} {expected.digest}, but {expected.uri} now "
                    f"holds {present}; put the old one back or train again"
                )
        return cls(uri, digest, config, network, autoencoder, (t5, clip), device)

    def check(self, request: PictureRequest) -> None:
        """Raise a UserError for what this model cannot draw."""
        steps, guidance = self._resolve(request)
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps is {steps}; choose 1 to {MAX_STEPS}")
        if not 0 <= request.seed < 2**63:
            raise UserError(f"seed is {request.seed}; choose 0 to 2^63 - 1")
        if self.kind == "student" and guidance != 1:
            raise UserError(
                f"guidance is {guidance}, but {self.uri} is a student with its teacher's guidance "
                "folded in: leave it at 1, or use the teacher"
            )
        if self.kind == "student" and request.sampler is not None:
            raise UserError(
                f"sampler is {request.sampler.name}, but {self.uri} is a student, which leaps by "
                "its own map: leave the sampler out, or use the teacher"
            )

    def embed(self, prompts: Sequence[str]) -> TextCondition:
        """Prompts to the network's condition."""
        t5, clip = self.encoders
        pairs = zip(t5.encode(list(prompts)), clip.encode(list(prompts)), strict=True)
        conditions = []
        for with_tokens, with_pooled in pairs:
            tokens, pooled = with_tokens.tokens, with_pooled.pooled
            assert tokens is not None
            assert pooled is not None
            mask = torch.ones(1, len(tokens), dtype=torch.bool)
            conditions.append(TextCondition(tokens[None], mask, pooled[None]))
        return TextCondition.cat(conditions).to(self.device)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[PictureRequest], on_step: OnStep | None = None
    ) -> np.ndarray:
        """Draw the pictures, (B, size, size, 3) uint8, in the order of the requests.

        Requests with the same steps and sampler share a batch; the rest may differ.

        Raises:
            UserError: see `check`.
        """
        pictures = np.zeros((len(requests), self.size, self.size, 3), np.uint8)
        groups: dict[tuple[int, SamplerChoice], list[int]] = {}
        for index, request in enumerate(requests):
            self.check(request)
            key = (self._resolve(request)[0], request.sampler or DEFAULT_SAMPLER)
            groups.setdefault(key, []).append(index)
        for (steps, sampler), indices in groups.items():
            latents = self._sample([requests[i] for i in indices], steps, sampler, on_step)
            pictures[indices] = self.decode(latents)
        return pictures

    def decode(self, latents: Tensor) -> np.ndarray:
        """Normalised latents (B, C, h, w) to pictures (B, H, W, 3) uint8."""
        raw = latents.cpu() * self._std + self._mean
        return to_image(self.autoencoder.decode(raw.to(self.device)).cpu())

    def _sample(
        self,
        requests: list[PictureRequest],
        steps: int,
        sampler: SamplerChoice,
        on_step: OnStep | None,
    ) -> Tensor:
        side = self.size // self.autoencoder.downsampling
        shape = (self.config.backbone.in_channels, side, side)
        x_T = torch.cat([_noise(request.seed, shape) for request in requests]).to(self.device)
        cond = self.embed([request.prompt for request in requests])
        grid = linear_grid(steps).to(self.device)
        if self.kind == "student":
            return sample_flow_map(FlowMap(self.network), x_T, grid, cond, on_step)
        scales = torch.tensor([self._resolve(request)[1] for request in requests])
        denoiser = self._guided(scales.to(self.device))
        return sampler.sample(denoiser, x_T, grid, cond, [r.seed for r in requests], on_step)

    def _guided(self, scales: Tensor) -> DenoiserLike:
        plain = Denoiser(self.network, FlowProcess(), Prediction.VELOCITY)
        if bool((scales == 1).all()):
            return plain  # saves the unconditional half of every pass
        return ClassifierFreeGuidance(plain, scales, self.embed([""]))

    def _resolve(self, request: PictureRequest) -> tuple[int, float]:
        steps = self.default_steps if request.steps is None else request.steps
        guidance = self.default_guidance if request.guidance is None else request.guidance
        return steps, guidance


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    return random.normal(seed, "picture", 0, torch.zeros(1, dtype=torch.int64), shape)


def annotate(image: np.ndarray, request: PictureRequest, generator: Any) -> bytes:
    """PNG bytes of a (H, W, 3) uint8 picture with request and model digest in a text chunk."""
    info = PngImagePlugin.PngInfo()
    resolved = {
        **asdict(request),
        "steps": request.steps or generator.default_steps,
        "guidance": generator.default_guidance if request.guidance is None else request.guidance,
        "model": generator.digest,
    }
    info.add_text("ldm", json.dumps(resolved, ensure_ascii=True))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def grid_image(pictures: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Lay out pictures (B, H, W, 3) uint8 in rows of `columns` on white."""
    count, height, width, _ = pictures.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet
