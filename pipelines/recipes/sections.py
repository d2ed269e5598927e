"""A stage's settings, one section for each: frozen, validated, and named after the stage."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.recipes.base import Section, TrainingSection, Workers
from pipelines.recipes.train_section import TrainSection as TrainSection


class AutoencoderSection(TrainingSection):
    """Stage 1: pixels <-> latents.

    Attributes:
        source: "train" trains a `diffusers.AutoencoderKL` on the pictures; "identity" works in
            pixel space; anything else is the path or URI of a diffusers autoencoder directory.
        downsampling: pixels per latent along a side, a power of two.
        temporal_downsampling: frames per frame of latents after the first.
        channels: latent channels. With a `source` elsewhere, this and the downsamplings only say
            what a plan expects of it.
        block_channels: channels of each level, finest first; log2(downsampling) + 1 of them.
        perceptual_weight: weight of the weight-free perceptual term.
        halved_share: share of the steps on which halved latents are to decode to halved pictures
            (EQ-VAE), for latents that are easier to learn from.
    """

    source: str = "train"
    downsampling: int = Field(4, ge=1)
    temporal_downsampling: int = Field(1, ge=1)
    channels: int = Field(4, ge=1)
    block_channels: tuple[Annotated[int, Field(ge=1)], ...] = (32, 64, 64)
    layers_per_block: int = Field(1, ge=1)
    steps: int = Field(600, ge=1)
    batch_size: int = Field(32, ge=1)
    kl_weight: float = Field(1e-6, ge=0)
    perceptual_weight: float = Field(0.1, ge=0)
    halved_share: float = Field(0.0, ge=0, le=1)

    def deciding(self) -> dict[str, Any]:
        """Without what only says what is expected."""
        values = super().deciding()
        del values["temporal_downsampling"]
        return values

    @model_validator(mode="after")
    def _levels(self) -> "AutoencoderSection":
        if self.source == "train" and 2 ** (len(self.block_channels) - 1) != self.downsampling:
            raise ValueError(
                f"downsampling {self.downsampling} needs log2 of it + 1 block_channels, "
                f"got {len(self.block_channels)}: {self.block_channels}"
            )
        return self


class TextSection(Section):
    """Text encoders: "tiny" builds one from the captions; else a Hugging Face directory or URI.

    Attributes:
        t5: token embeddings, e.g. a copy of google/t5-v1_1-xxl, or of any other text encoder of
            transformers: mT5, UMT5, ByT5, CLIP or "URI + URI" of two, BERT, Gemma, Qwen, Llama.
        clip: pooled embedding, e.g. a copy of openai/clip-vit-large-patch14, or "URI + URI" of two.
        clip_tokens: whether the token embeddings of `clip`, of its last layer, are stored beside
            its pooled one. Training reads those of `t5`, which may be the same CLIP.
        max_tokens: captions are cut here; embeddings are stored at their true length.
        tiny_width: of the embeddings of "tiny" encoders.
        t5_width, clip_width: of other encoders' embeddings; they only say what a plan expects.
    """

    t5: str = "tiny"
    clip: str = "tiny"
    clip_tokens: bool = False
    max_tokens: int = Field(128, ge=2)
    tiny_width: int = Field(64, ge=8)
    t5_width: int = Field(4096, ge=1)
    clip_width: int = Field(768, ge=1)

    @property
    def token_width(self) -> int:
        """Channels of a caption's tokens."""
        return self.tiny_width if self.t5 == "tiny" else self.t5_width

    @property
    def vector_width(self) -> int:
        """Channels of a pooled caption."""
        return self.tiny_width if self.clip == "tiny" else self.clip_width


class EncodeSection(Section):
    """Stage 2: files -> the latent store.

    Attributes:
        shard_size: the most samples of a shard, which is a file of the store.
        shard_mib: the most MiB of its decoded pixels, which travel from CPU tasks to the encoder,
            or of its captions' tokens.
        batch_size: frames encoded at once.
        max_aspect: 1 crops all to squares of the recipe's size; with more, pictures go to buckets
            of about as many pixels whose sides are up to this ratio apart.
        upscale: whether small pictures are enlarged; else they go to smaller buckets.
        fps, frames, stride: videos are sampled at fps and cut into clips of so many frames, which
            begin `stride` frames apart; None is one after the other.
        cut_at_scenes: whether clips end where the scene changes.
        text_dtype: "int8-b16" takes 9/16 of the bytes of "float16".
        channels_last: the memory layout of the autoencoder's convolutions: a quarter less time on
            CPUs, other rounding.
        precision: in which the autoencoder computes; "bf16" is faster on GPUs and on CPUs with
            units for it, and its latents are off by 1 to 2 % of their spread.
        tile: side in pixels of the tiles in which larger pictures and frames are encoded, one at a
            time; None encodes them whole.
        flip: whether every picture and clip has a second row, mirrored left to right. Captions stay
            as they are: not for data whose captions say left and right.
        max_reject_share: the job stops when more than this share of the rows of media (samples and
            rejects, those of earlier runs too) are rejects, or of the first 1,000 it makes or more.
        item_seconds, item_gib: a file that takes more to decode is a reject.
        worker_hour_price: for the cost a dry run tells, in whatever currency.
    """

    shard_size: int = Field(1024, ge=1)
    shard_mib: int = Field(64, ge=1)
    batch_size: int = Field(64, ge=1)
    max_aspect: float = Field(1.0, ge=1, le=8)
    upscale: bool = False
    fps: float = Field(8.0, gt=0)
    frames: int = Field(17, ge=1)
    stride: int | None = Field(None, ge=1)
    cut_at_scenes: bool = False
    text_dtype: Literal["float16", "int8-b16"] = "float16"
    channels_last: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    tile: int | None = Field(None, ge=1)
    flip: bool = False
    max_reject_share: float = Field(0.5, ge=0, le=1)
    item_seconds: float = Field(120.0, gt=0)
    item_gib: float = Field(4.0, gt=0)
    worker_hour_price: float = Field(0.0, ge=0)
    workers: Workers = Workers()


class DistillSection(TrainingSection):
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
    learning_rate: float = Field(1e-3, gt=0)
    ema_decay: float = Field(0.98, ge=0, lt=1)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _halves(self) -> "DistillSection":
        if self.student_steps & (self.student_steps - 1):
            raise ValueError(
                f"student_steps {self.student_steps} is not a power of two: longer leaps are "
                "learned from two of half their length"
            )
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
