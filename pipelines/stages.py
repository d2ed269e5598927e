"""The stages between the pictures and the endpoint, in their order.

Their code takes seconds to import, so a stage's is imported when the stage is run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.stage import StageFunction


@dataclass(frozen=True)
class Stage:
    """One of them.

    Attributes:
        name: of its command.
        load: imports and returns what runs it.
        title: from what to what.
        text: what its command's help says.
        next: the command to run afterwards.
    """

    name: str
    load: Callable[[], "StageFunction"]
    title: str
    text: str
    next: str


def _train_autoencoder() -> "StageFunction":
    from pipelines.train_autoencoder import train_autoencoder

    return train_autoencoder


def _encode() -> "StageFunction":
    from pipelines.encode_latents import encode

    return encode


def _train_denoiser() -> "StageFunction":
    from pipelines.train_denoiser import train_denoiser

    return train_denoiser


def _distill_student() -> "StageFunction":
    from pipelines.distill_student import distill_student

    return distill_student


def _evaluate() -> "StageFunction":
    from pipelines.evaluate_model import evaluate

    return evaluate


STAGES = (
    Stage(
        "autoencoder",
        _train_autoencoder,
        "pixels to latents and back",
        "Train the autoencoder, pixels to latents, on the pictures.",
        next="encode",
    ),
    Stage(
        "encode",
        _encode,
        "pictures and captions to the latent store",
        "Encode new and changed pictures into the latent store.",
        next="train",
    ),
    Stage(
        "train",
        _train_denoiser,
        "the store to a teacher",
        "Train the teacher on the newest version of the latent store.",
        next="distill",
    ),
    Stage(
        "distill",
        _distill_student,
        "the teacher to a student of a few steps",
        "Distil the teacher into a student that draws in a few steps.",
        next="evaluate",
    ),
    Stage(
        "evaluate",
        _evaluate,
        "whether the pictures show what was asked for",
        "Count how often teacher and student draw what the captions say.",
        next="serve",
    ),
)
