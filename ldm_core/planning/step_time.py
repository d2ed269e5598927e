"""How long a training step takes, by a stated model. Predicted, not measured.

Devices compute at an assumed share of their peak, all FLOPs counted, also those computed again. On
top comes what communication cannot be hidden behind computing:

- sharded weights are gathered for the forward and again for the backward pass, and their float32
  gradients scattered, for each micro-batch: hidden as far as the micro-batch computes;
- replicas add up their float32 gradients once a step: hidden behind the last backward pass;
- devices that share a sample exchange its queries, keys, values and results in every attention, of
  the forward pass and of the backward: not hidden;
- the optimiser reads and writes its share of the state once, and Muon orthogonalises: not hidden.

A ring of n devices moves (n - 1) / n of the whole through the slowest of its links, at `LINK_SHARE`
of what the data sheet says.
"""

from dataclasses import dataclass
from typing import Final

from ldm_core.planning.accelerators import Accelerator
from ldm_core.planning.memory import moments
from ldm_core.planning.step import Sample, Step
from ldm_core.planning.weights import muon_flops

UTILISATION: Final = 0.4
"""Assumed share of the bfloat16 peak while a device computes; of wide layers and long sequences."""
LINK_SHARE: Final = 0.8


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what follows.

    Attributes:
        compute: forward and backward passes.
        exposed: communication that is not hidden.
        update: of the optimiser.
        samples: of the step.
        flops: of the step on one device, without recomputation.
        devices: that take part.
        on: which.
    """

    compute: float
    exposed: float
    update: float
    samples: int
    flops: float
    devices: int
    on: Accelerator

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.compute + self.exposed + self.update

    @property
    def samples_per_second(self) -> float:
        """Of all devices together."""
        return self.samples / self.seconds

    @property
    def tflops(self) -> float:
        """Of one device, 1e12 FLOP/s, without recomputation."""
        return self.flops / self.seconds / 1e12

    @property
    def mfu(self) -> float:
        """Share of the peak, without recomputation (Chowdhery et al. 2022, App. B)."""
        return self.tflops / self.on.tflops

    def cost_per_million(self, hour_price: float) -> float:
        """Of a million samples, at the price of a device for an hour."""
        return 1e6 / self.samples_per_second * self.devices * hour_price / 3600


def step_time(
    step: Step, sample: Sample, on: Accelerator, utilisation: float = UTILISATION
) -> StepTime:
    """Predict a step whose samples are all of this bucket."""
    layout, local = step.layout, step.local(sample)  # the caption's share is counted as it is done
    rate = utilisation * on.tflops * 1e12 / (1 if step.compute_bytes < 4 else 2)  # TF32: half
    round_s = local * (step.flops(sample) + step.recomputed_flops(sample)) / rate
    tail = 2 / 3 * round_s
    exposed = step.rounds * (_exchange(step, sample, on) + max(0, _shards(step, on) - round_s))
    exposed += max(0, _replicas(step, on) - tail)
    return StepTime(
        compute=step.rounds * round_s,
        exposed=exposed,
        update=_update(step, on, rate),
        samples=step.per_step(sample),
        flops=step.per_step(sample) * step.flops(sample) / layout.world,
        devices=layout.world,
        on=on,
    )


def _link(on: Accelerator, span: int) -> float:
    """Bytes/s of a ring within `span` neighbouring devices."""
    return LINK_SHARE * on.bandwidth(span)


def _shards(step: Step, on: Accelerator) -> float:
    """Seconds to gather weights twice and to scatter their gradients once."""
    n = step.layout.holders
    moved = (2 * step.compute_bytes * step.held + 4 * step.trained) * (n - 1) / n
    return moved / _link(on, n)


def _replicas(step: Step, on: Accelerator) -> float:
    """Seconds to add up the gradients of all who hold the same share of the weights."""
    n = step.layout.world // step.layout.holders
    moved = 2 * 4 * step.trained / step.layout.holders * (n - 1) / n
    return moved / _link(on, step.layout.world if n > 1 else 1)


def _exchange(step: Step, sample: Sample, on: Accelerator) -> float:
    """Seconds of the all-to-alls of attention in a micro-batch (Jacobs et al. 2023)."""
    n = step.layout.context
    passes = 3 if step.checkpointing == "full" else 2
    held = step.micro_samples[sample.bucket] * sample.forward.attention_bytes / n
    return passes * held * (n - 1) / n / _link(on, n)


def _update(step: Step, on: Accelerator, rate: float) -> float:
    """Seconds to read gradients, and to read and write weights, moments and averages."""
    numbers = (3 + 2 * step.averages) * step.trained + 2 * moments(step)
    moved = 4 * numbers / step.layout.holders / (LINK_SHARE * on.memory_gbs * 1e9)
    shared = muon_flops(step.weights.matrices) if step.optimizer == "muon" else 0
    return moved + shared / step.layout.world / rate
