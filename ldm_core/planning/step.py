"""What one training step is: the network's costs, how it is parallel, how it is trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ldm_core.planning.forward_pass import Checkpointing, ForwardPass
from ldm_core.planning.weights import Weights
from ldm_core.training.layout import Layout


@dataclass(frozen=True)
class Sample:
    """A size of samples: tokens of the image or video, tokens of its caption, and their pass."""

    bucket: str
    tokens: int
    text_tokens: int
    forward: ForwardPass


@dataclass(frozen=True)
class Step:
    """A training step.

    Attributes:
        weights: of the network.
        samples: one for each bucket.
        layout: of the devices.
        micro_batches: of a step, dealt out to those that are given different samples.
        micro_samples: of each bucket, in one micro-batch.
        optimizer: Muon keeps one number for each weight of a hidden matrix, AdamW two.
        averages: moving averages of the weights.
        compute_bytes: of a number in the forward and backward pass; masters have 4.
        checkpointing: what the forward pass keeps.
        adapters: weights of low-rank adapters, if they alone are trained.
    """

    weights: Weights
    samples: tuple[Sample, ...]
    layout: Layout
    micro_batches: int
    micro_samples: Mapping[str, int]
    optimizer: Literal["muon", "adamw"]
    averages: int
    compute_bytes: int
    checkpointing: Checkpointing
    adapters: int | None = None

    @property
    def held(self) -> int:
        """Weights in all."""
        return self.weights.total + (self.adapters or 0)

    @property
    def trained(self) -> int:
        """Weights that have gradients, moments and averages."""
        return self.weights.total if self.adapters is None else self.adapters

    @property
    def rounds(self) -> int:
        """Micro-batches that a device takes one after the other."""
        return math.ceil(self.micro_batches / self.layout.data_world)

    def per_step(self, sample: Sample) -> int:
        """Samples of a step, if all are of this bucket."""
        return self.micro_batches * self.micro_samples[sample.bucket]

    def local(self, sample: Sample) -> float:
        """Samples of a micro-batch on one device: its tokens are dealt out, its caption is not."""
        caption, all_tokens = sample.text_tokens, sample.text_tokens + sample.tokens
        part = (caption + sample.tokens / self.layout.context) / all_tokens
        return self.micro_samples[sample.bucket] * part

    def flops(self, sample: Sample) -> int:
        """Of one sample's training: the backward pass is two forward passes, or one where weights
        are frozen. No recomputation, and nothing for adapters.
        """
        return (3 if self.adapters is None else 2) * sample.forward.flops

    def recomputed_flops(self, sample: Sample) -> int:
        """Of what full checkpointing computes again; selective repeats pointwise work alone."""
        return sample.forward.block_flops if self.checkpointing == "full" else 0
