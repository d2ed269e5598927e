"""Steps of an optimiser with made-up gradients; apart from the tests, which workers lack."""

import torch
from torch import Tensor, nn

SHAPES = [(8, 24), (24, 8), (16, 16), (8, 4, 3, 3), (6, 6), (16, 16), (24, 8), (16, 16)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for i, weight in enumerate(weights):
            weight.grad = normal(*weight.shape, seed=1000 + 10 * step + i)
        optimizer.step()
