"""What a training tells its run every so often, over all its workers."""

from collections.abc import Mapping, Sequence
from functools import cache

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_core.conditioning.text import TextCondition
from ldm_core.latents.reader import LatentBatch
from ldm_core.planning.accelerators import Accelerator, accelerator
from ldm_core.planning.forward_pass import measure_forward
from ldm_core.reading.stream import StreamReader
from ldm_core.training.loss_by_time import LossByTime
from ldm_core.training.parallel import Parallel
from pipelines.backbones import BackboneConfig, new_backbone
from pipelines.meter import Meter
from pipelines.recipes.sections import TrainSection
from pipelines.training_data import tokens_of

CHECKSUM = 2**40 - 1  # of a sample's key; a float64 holds it
GIB = 2**30


class Figures:
    """Counts a worker's samples, and adds up all workers' counts when they are read.

    The checksum is of the ids since the last reading: two runs that read the same samples between
    two steps have the same, however many workers they have.

    Args:
        parallel: the network in its layout.
        work: FLOPs of a batch.
        on: what the workers compute with, if the recipe says so: for MFU.
        price: of a worker's hour, in whatever currency; 0 is not known.
        log_every: steps between readings.
    """

    def __init__(
        self,
        parallel: Parallel,
        work: "Work",
        on: Accelerator | None,
        price: float,
        log_every: int,
    ) -> None:
        self.parallel, self.work, self.on, self.price = parallel, work, on, price
        self.log_every = log_every
        self.meter, self.by_time = Meter(), LossByTime(device=parallel.device)
        self._own = torch.zeros(2, dtype=torch.float64)  # tokens, FLOPs
        self._checksum = torch.zeros(1, dtype=torch.int64)
        self._first = 0

    def begin(self, first: int) -> None:
        """Training goes on after so many steps."""
        self._first = first

    def count(self, batches: Sequence[LatentBatch], total: int) -> None:
        """Of a step: this worker's batches, and the samples of all."""
        self.meter.count(total)
        for batch in batches:
            self._own[0] += self.work.tokens(batch)
            self._own[1] += self.work.step_flops(batch)
            self._checksum += (batch.ids & CHECKSUM).sum()

    def read(self, done: int) -> dict[str, float]:
        """The figures since the last time, after `done` steps; all workers call this together."""
        own = self._own.to(self.parallel.device)
        sums = torch.cat([own, self.by_time.sums.flatten()])
        layout = self.parallel.layout
        checksum = self._checksum.to(self.parallel.device, copy=True)  # the original starts anew
        if layout.world > 1:
            dist.all_reduce(sums)
            dist.all_reduce(checksum)
        sums /= layout.context  # whose workers count the same samples
        tokens, flops = sums[:2].tolist()
        self.by_time.sums.copy_(sums[2:].view(2, -1))
        self._own.zero_()
        self._checksum.zero_()
        seconds, figures = self.meter.elapsed(), self.meter.read()
        rates = {
            "tokens_per_second": tokens / seconds,
            "tflops_per_worker": _tera(flops, seconds, layout.world),
        }
        rates |= self._utilisation(rates["tflops_per_worker"])
        rates |= self._cost(figures["samples_per_second"], layout.world)
        bins = {f"loss/{name}": value for name, value in self.by_time.read().items()}
        kept = {"memory_gib": memory_gib(self.parallel.device)}
        if self._first % self.log_every == 0:  # else it begins in the middle of a stretch
            ids = int(checksum) // layout.context % (CHECKSUM + 1)
            kept |= {"samples_checksum": float(ids)}
        self._first = done
        return figures | rates | bins | kept

    def _utilisation(self, tflops: float) -> dict[str, float]:
        return {"mfu": tflops / self.on.tflops} if self.on else {}

    def _cost(self, rate: float, workers: int) -> dict[str, float]:
        if not self.price:
            return {}
        return {"cost_per_million_samples": 1e6 / rate / 3600 * workers * self.price}


def new_figures(
    section: TrainSection, config: BackboneConfig, reader: StreamReader, parallel: Parallel
) -> Figures:
    """As the recipe says."""
    on = accelerator(section.accelerator) if section.accelerator else None
    price = section.worker_hour_price or (on.hour_price if on else 0.0)
    passes = 3 if section.lora_rank is None else 2
    work = Work(config, reader.shapes, section.patch_size, passes)
    return Figures(parallel, work, on, price, section.log_every)


def _tera(flops: float, seconds: float, workers: int) -> float:
    return flops / seconds / workers / 1e12


def memory_gib(device: torch.device) -> float:
    """The most that a GPU's tensors took, or what a process on a CPU takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB


class Work:
    """Tokens and FLOPs of batches, a multiply-add being 2 and a training step three forward passes,
    or two where weights are frozen beside adapters.

    What activation checkpointing computes again is not counted. Captions count at the length they
    have in the batch: FLOPs are a polynomial of degree 2 in it, and three lengths tell which.
    """

    def __init__(
        self,
        config: BackboneConfig,
        shapes: Mapping[str, tuple[int, ...]],
        patch_size: int,
        passes: int = 3,
    ) -> None:
        self.config, self.shapes, self.patch_size = config, dict(shapes), patch_size
        self.passes = passes
        with torch.device("meta"):
            self._network: nn.Module = new_backbone(config)
        self._polynomial = cache(self._measured)

    def tokens(self, batch: LatentBatch) -> int:
        """Of the latents."""
        return len(batch) * tokens_of(self.shapes[batch.bucket], self.patch_size)

    def step_flops(self, batch: LatentBatch) -> float:
        """Of forward and backward pass."""
        length = batch.condition.tokens.shape[1]
        a, b, c = self._polynomial(batch.bucket)
        return self.passes * len(batch) * (a + b * length + c * length**2)

    def _measured(self, bucket: str) -> tuple[float, float, float]:
        lengths = torch.tensor([2.0, 16.0, 128.0], dtype=torch.float64)
        flops = [self._forward(bucket, int(length)) for length in lengths]
        powers = torch.stack([lengths**k for k in range(3)], dim=1)
        a, b, c = torch.linalg.solve(powers, torch.tensor(flops, dtype=torch.float64)).tolist()
        return a, b, c

    def _forward(self, bucket: str, length: int) -> float:
        with torch.device("meta"):
            caption = TextCondition(
                torch.empty(1, length, self.config.text_width),
                torch.ones(1, length, dtype=torch.bool),
                torch.empty(1, self.config.pooled_width),
            )
            x_t: Tensor = torch.empty(1, *self.shapes[bucket])
            t = torch.empty(1)
        return float(measure_forward(self._network, x_t, t, caption).flops)
