"""Figures of small batches by one worker or several; apart from the tests, so that these start
quickly.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.conditioning.text import TextCondition
from ldm_core.latents.reader import LatentBatch
from ldm_core.planning.accelerators import accelerator
from ldm_core.training.layout import Layout
from ldm_core.training.parallel import Parallel
from pipelines import meter
from pipelines.training_figures import CHECKSUM, Figures, Work

CPU = torch.device("cpu")
H100, PRICE, SECONDS = accelerator("H100-80"), 3.0, 4.0
SHAPES = {"16x16x1": (4, 8, 8), "16x16x9": (4, 3, 8, 8)}
CONFIG = MMDiTConfig(
    in_channels=4, patch_size=2, width=64, depth=2, single_depth=1, heads=4, rotary=(4, 6, 6),
    text_width=24, pooled_width=16,
)  # fmt: skip
LAYOUTS = {
    "replicate": Layout(replicate=2),
    "shard": Layout(shard=2),
    "context": Layout(context=2),
}
FIRST_IDS, SECOND_IDS = (5, CHECKSUM, -7), (11, 2**62)


def batch(ids: tuple[int, ...], length: int, bucket: str = "16x16x1") -> LatentBatch:
    """Of samples with captions of so many tokens."""
    generator = torch.Generator().manual_seed(length)
    caption = TextCondition(
        torch.randn(len(ids), length, CONFIG.text_width, generator=generator),
        torch.ones(len(ids), length, dtype=torch.bool),
        torch.randn(len(ids), CONFIG.pooled_width, generator=generator),
    )
    latents = torch.randn(len(ids), *SHAPES[bucket], generator=generator)
    return LatentBatch(latents, caption, torch.tensor(ids), [""] * len(ids), bucket)


BATCHES = (batch(FIRST_IDS, 7), batch(SECOND_IDS, 40, "16x16x9"))
TOTAL = len(FIRST_IDS) + len(SECOND_IDS)


def losses_of(found: LatentBatch) -> tuple[Tensor, Tensor]:
    """Times and losses of its samples, of which one is not a number."""
    t = torch.linspace(0.05, 0.9, len(found))
    losses = found.condition.pooled[:, 0].square()
    losses[-1] = float("nan")
    return t, losses


def figures_of(layout: Layout, log_every: int = 10) -> Figures:
    """Of a network that computes nothing."""
    network = nn.Linear(1, 1)
    parallel = Parallel(network, network, layout, CPU)
    return Figures(parallel, Work(CONFIG, SHAPES, CONFIG.patch_size), H100, PRICE, log_every)


def read(layout: Layout, mine: tuple[LatentBatch, ...]) -> list[dict[str, float]]:
    """What a worker of these batches reads after four seconds, and again after four without."""
    now = [0.0]
    meter.time = SimpleNamespace(monotonic=lambda: now[0])
    figures = figures_of(layout)
    figures.begin(0)
    figures.count(mine, TOTAL)
    for each in mine:
        figures.by_time.add(*losses_of(each))
    read = []
    for done in (10, 20):
        now[0] += SECONDS
        read.append(figures.read(done))
        figures.count((), 1)  # or there is no rate to divide by
    return read


def be_one_of_two(rank: int, folder: str) -> None:
    """Read in every layout of two workers."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/two", rank=rank, world_size=2)
    found = {
        name: read(layout, BATCHES if layout.context == 2 else BATCHES[rank : rank + 1])
        for name, layout in LAYOUTS.items()
    }
    dist.destroy_process_group()
    torch.save(found, Path(folder, f"{rank}.pt"))
