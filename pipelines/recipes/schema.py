"""What a run is: one frozen, validated object that names everything from the data to the endpoint.

A recipe is a Python function that returns a `Recipe` (see `pipelines/recipes/`). Each stage reads
its own section and the URIs of the products before it; `--set section.field=value` overrides.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ldm_core.errors import UserError
from ldm_core.files import absolute


class Section(BaseModel):
    """Base of all sections: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Workers(Section):
    """How many Ray workers a stage gets, and what each of them holds."""

    count: int = Field(2, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    @property
    def threads(self) -> int:
        """Of each worker's torch."""
        return max(1, int(self.cpus))

    @property
    def device(self) -> str:
        """Where a worker computes: a GPU it was not given is somebody else's."""
        return "cuda" if self.gpus else "cpu"


def check_shares(batch_size: int, workers: Workers) -> None:
    """Every worker takes the same share of a batch: their gradients are averaged as equals."""
    if batch_size % workers.count:
        near = math.ceil(batch_size / workers.count) * workers.count
        raise ValueError(
            f"batch_size {batch_size} does not divide among workers.count {workers.count}: try "
            f"batch_size {near} or another workers.count"
        )


def check_size(size: int, downsampling: int) -> None:
    """Every latent stands for a whole square of pixels."""
    if size % downsampling:
        raise UserError(
            f"size {size} is no multiple of the autoencoder's downsampling {downsampling}: try "
            f"--set size={max(1, size // downsampling) * downsampling}"
        )


class AutoencoderSection(Section):
    """Stage 1: pixels <-> latents.

    Attributes:
        source: "train" trains a `diffusers.AutoencoderKL` on the pictures; "identity" works in
            pixel space; anything else is the path or URI of a diffusers autoencoder directory.
        downsampling: pixels per latent along a side, a power of two.
        channels: latent channels.
        block_channels: channels of each level, finest first; log2(downsampling) + 1 of them.
        perceptual_weight: weight of the weight-free perceptual term.
    """

    source: str = "train"
    downsampling: int = Field(4, ge=1)
    channels: int = Field(4, ge=1)
    block_channels: tuple[Annotated[int, Field(ge=1)], ...] = (32, 64, 64)
    layers_per_block: int = Field(1, ge=1)
    steps: int = Field(600, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    kl_weight: float = Field(1e-6, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    checkpoint_every: int = Field(200, ge=1)
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _levels(self) -> "AutoencoderSection":
        if self.source == "train" and 2 ** (len(self.block_channels) - 1) != self.downsampling:
            raise ValueError(
                f"downsampling {self.downsampling} needs log2 of it + 1 block_channels, "
                f"got {len(self.block_channels)}: {self.block_channels}"
            )
        return self

    @model_validator(mode="after")
    def _shares(self) -> "AutoencoderSection":
        check_shares(self.batch_size, self.workers)
        return self


class TextSection(Section):
    """Text encoders: "tiny" builds one from the captions; else a Hugging Face directory or URI.

    Attributes:
        t5: token embeddings, e.g. a copy of google/t5-v1_1-xxl.
        clip: pooled embedding, e.g. a copy of openai/clip-vit-large-patch14.
        max_tokens: captions are cut here; embeddings are stored at their true length.
    """

    t5: str = "tiny"
    clip: str = "tiny"
    max_tokens: int = Field(128, ge=2)
    tiny_width: int = Field(64, ge=8)


class EncodeSection(Section):
    """Stage 2: files -> the latent store."""

    shard_size: int = Field(1024, ge=1)
    batch_size: int = Field(64, ge=1)
    workers: Workers = Workers()


class TrainSection(Section):
    """Stage 3: the store -> a text-conditioned latent diffusion transformer.

    Attributes:
        batch_size: samples per optimiser step, over all workers.
        learning_rate: of AdamW; Muon's update is scaled to match its RMS.
        timestep_mean, timestep_std: of the logit-normal draw; shift moves mass to more noise.
        sample_steps, guidance: what the model draws with unless told otherwise, previews included.
        max_failures: worker failures Ray Train retries from the last checkpoint.
    """

    patch_size: int = Field(2, ge=1)
    width: int = Field(192, ge=16)
    depth: int = Field(8, ge=1)
    heads: int = Field(6, ge=1)
    steps: int = Field(800, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    caption_drop: float = Field(0.1, ge=0, lt=1)
    timestep_mean: float = 0.0
    timestep_std: float = Field(1.0, gt=0)
    timestep_shift: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    sample_steps: int = Field(32, ge=1)
    guidance: float = Field(2.5, ge=1)
    log_every: int = Field(20, ge=1)
    sample_every: int = Field(400, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    max_failures: int = Field(3, ge=0)
    compile: bool = False
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _shares(self) -> "TrainSection":
        check_shares(self.batch_size, self.workers)
        return self


class DistillSection(Section):
    """Stage 4: teacher + store -> a few-step student with the guidance folded in.

    Attributes:
        guidance: the teacher's guidance scale that the student reproduces at scale 1.
        student_steps: the most steps the student is trained to need.
        teacher_substeps: teacher Euler steps that span one of the student's.
    """

    guidance: float = Field(2.5, ge=1)
    student_steps: int = Field(4, ge=1)
    teacher_substeps: int = Field(4, ge=1)
    guidance_steps: int = Field(60, ge=0)
    steps: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.98, ge=0, lt=1)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    max_failures: int = Field(3, ge=0)
    workers: Workers = Workers()

    @model_validator(mode="after")
    def _halves(self) -> "DistillSection":
        if self.student_steps & (self.student_steps - 1):
            raise ValueError(
                f"student_steps {self.student_steps} is not a power of two: longer leaps are "
                "learned from two of half their length"
            )
        return self

    @model_validator(mode="after")
    def _shares(self) -> "DistillSection":
        check_shares(self.batch_size, self.workers)
        return self


class EvaluateSection(Section):
    """Stage 5: pictures for fixed prompts at fixed seeds, scored by the verifier."""

    single_prompts: int = Field(256, ge=1)
    double_prompts: int = Field(128, ge=0)
    teacher_steps: int = Field(32, ge=1)
    student_steps: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4)
    batch_size: int = Field(64, ge=1)
    seed: int = Field(1234, ge=0)
    workers: Workers = Workers()


class ServeSection(Section):
    """Stage 6: the endpoint.

    Attributes:
        max_queued_pictures: that wait beside those the replicas hold; more are refused (429).
        max_batch_size: pictures drawn at once by a replica.
        max_pictures, max_steps: the most one request may ask for.
    """

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    target_ongoing_requests: int = Field(8, ge=1)
    max_queued_pictures: int = Field(64, ge=1)
    max_batch_size: int = Field(16, ge=1)
    batch_wait_s: float = Field(0.02, ge=0)
    max_pictures: int = Field(16, ge=1)
    max_steps: int = Field(128, ge=1)
    workers: Workers = Workers()


class Recipe(Section):
    """A whole project: where the data lies, where the products go, and every stage's settings.

    Attributes:
        data: folder or `s3://` prefix of captioned pictures.
        root: folder or `s3://` prefix of all products; each stage's place follows from it.
        size: side of the square training pictures, pixels.
        tracking_uri: of MLflow; None takes MLFLOW_TRACKING_URI, else sqlite beside the products.
        model_name: name in the MLflow registry.
    """

    name: str
    data: str
    root: str
    seed: int = 0
    size: int = Field(64, ge=8)
    experiment: str = "latent-diffusion"
    tracking_uri: str | None = None
    model_name: str = "shapes"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    autoencoder: AutoencoderSection = AutoencoderSection()
    text: TextSection = TextSection()
    encode: EncodeSection = EncodeSection()
    train: TrainSection = TrainSection()
    distill: DistillSection = DistillSection()
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _whole_latents(self) -> "Recipe":
        if self.autoencoder.source == "train":  # another's downsampling is known once it is loaded
            check_size(self.size, self.autoencoder.downsampling)
        return self

    def product(self, name: str) -> str:
        """URI of a stage's product, e.g. `product("latents")`."""
        return f"{self.root.rstrip('/')}/{name}"

    def located(self) -> "Recipe":
        """The same with local paths made absolute: workers run in folders of their own."""

        def place(value: str) -> str:
            return value if value in ("train", "identity", "tiny") else absolute(value)

        text = {"t5": place(self.text.t5), "clip": place(self.text.clip)}
        source = {"source": place(self.autoencoder.source)}
        return self.model_copy(
            update={
                "data": place(self.data),
                "root": place(self.root),
                "autoencoder": self.autoencoder.model_copy(update=source),
                "text": self.text.model_copy(update=text),
            }
        )

    @property
    def autoencoder_uri(self) -> str:
        """Where the autoencoder is, or "identity"."""
        trained = self.autoencoder.source == "train"
        return self.product("autoencoder") if trained else self.autoencoder.source

    @property
    def t5_uri(self) -> str:
        """Where the T5 encoder is."""
        return self.product("text/t5") if self.text.t5 == "tiny" else self.text.t5

    @property
    def clip_uri(self) -> str:
        """Where the CLIP text model is."""
        return self.product("text/clip") if self.text.clip == "tiny" else self.text.clip
