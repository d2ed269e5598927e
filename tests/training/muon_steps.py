"""Steps of Muon with made-up gradients; apart from the tests, so that a worker starts quickly."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_core.training.optimizers import Muon

SHAPES = [(8, 24), (24, 8), (16, 16), (8, 4, 3, 3), (6, 6)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = normal(*weight.shape, seed=1000 + 10 * step + i)
        optimizer.step()


def train_a_share(rank: int, folder: str) -> None:
    """Be one of two workers that have the same gradients."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    weights = weights_of()
    train(Muon(weights, 0.05, weight_decay=0.1, rank=rank, world=2), weights, 3)
    torch.save([weight.data for weight in weights], Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
