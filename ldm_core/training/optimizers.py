"""AdamW, alone or with Muon beside it, under one learning rate."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm_core.training.muon_shares import of_shards, of_whole
from ldm_core.training.schedules import warmup_then_decay as warmup_then_decay
from ldm_core.training.shards import local, shard_group


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix (Jordan et al. 2024).

    As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, with three differences: the
    Newton-Schulz iteration runs in the dtype the caller chooses (torch's is always bfloat16, which
    on a CPU without bf16 units is several times slower than float32), convolution kernels count as
    matrices of (out, in x height x width), and workers share the iteration's work, also where each
    of them holds rows of every matrix (FSDP2, HSDP): momentum is then as sharded as the weights.

    Args:
        params: matrices and kernels, all of them whole or all of them sharded.
        lr: of AdamW; the update is scaled to AdamW's usual RMS of 0.2 (Liu et al. 2025, Eq. 4).
        momentum: Nesterov momentum.
        weight_decay: decoupled.
        dtype: of the orthogonalisation.
        rank, world: with gradients already averaged over `world` workers of the default process
            group, each orthogonalises a share of the matrices and they exchange the results. Shards
            know their workers themselves.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.rank, self.world = dtype, rank, world

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight; all of them have a gradient."""
        for group in self.param_groups:
            weights: list[Tensor] = group["params"]
            ahead = [self._ahead(weight, group["momentum"]) for weight in weights]
            for weight, update in zip(weights, self._orthogonal(weights, ahead), strict=True):
                scale = 0.2 * math.sqrt(max(_matrix_shape(weight)))
                held = local(weight)
                held.mul_(1 - group["lr"] * group["weight_decay"])
                held.add_(update.view(held.shape), alpha=-group["lr"] * scale)

    def _ahead(self, weight: Tensor, share: float) -> Tensor:
        """The Nesterov momentum of what is held of a weight, as a matrix."""
        assert weight.grad is not None, "Muon expects a gradient for every weight"
        state, gradient = self.state[weight], local(weight.grad)
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = local(state["momentum"]).lerp_(gradient, 1 - share)
        return gradient.lerp(momentum, share).flatten(1)

    def _orthogonal(self, weights: list[Tensor], ahead: list[Tensor]) -> list[Tensor]:
        work = partial(orthogonalise, dtype=self.dtype)
        first = weights[0]
        if isinstance(first, DTensor):
            rows = [weight.shape[0] for weight in weights]
            return of_shards(ahead, rows, work, shard_group(first))
        return of_whole(ahead, work, self.rank, self.world)


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.numel() // weight.shape[0]


def orthogonalise(matrix: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """U V^T of the SVD of a matrix (rows, columns), or of each of (K, rows, columns), roughly:
    singular values end within about [0.7, 1.2].

    Quintic Newton-Schulz iteration with the coefficients of Jordan et al. 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix is then the smaller one
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Optimizers:
    """Several optimisers stepped as one, under one learning-rate multiplier."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.all = optimizers
        self._base = [[group["lr"] for group in opt.param_groups] for opt in optimizers]

    def step(self, multiplier: float) -> None:
        """Step all at `multiplier` times their base learning rates."""
        for optimizer, rates in zip(self.all, self._base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * multiplier
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """One state per optimiser."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """What `state_dict` gave."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def muon_and_adamw(
    network: nn.Module,
    matrices: Iterable[Tensor],
    learning_rate: float,
    weight_decay: float = 0.0,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
) -> Optimizers:
    """Muon on `matrices`, AdamW on the network's other parameters (decay on matrices only).

    Neither has what needs no gradient. Of a sharded network, choose matrices after it was sharded.
    """
    chosen = {id(weight): weight for weight in matrices if weight.requires_grad}
    rest = [weight for weight in _trained(network) if id(weight) not in chosen]
    muon = Muon(
        chosen.values(),
        learning_rate,
        weight_decay=weight_decay,
        dtype=dtype,
        rank=rank,
        world=world,
    )
    return Optimizers(muon, _adamw(rest, learning_rate, weight_decay))


def adamw(network: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> Optimizers:
    """AdamW on all of the network's parameters that are trained (decay on matrices only)."""
    return Optimizers(_adamw(_trained(network), learning_rate, weight_decay))


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in network.parameters() if weight.requires_grad]


def _adamw(weights: Sequence[Tensor], learning_rate: float, decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [w for w in weights if _is_matrix(w)], "weight_decay": decay},
        {"params": [w for w in weights if not _is_matrix(w)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def _is_matrix(weight: Tensor) -> bool:
    """Whether it maps several inputs: not the scales (2, 1, K) of queries and keys, which decay
    would pull to zero.
    """
    return weight.ndim >= 2 and weight.shape[1] > 1


def hidden_matrices(*blocks: nn.Module) -> list[Tensor]:
    """The matrices of attention and MLP in a transformer's lists of blocks: what Muon is meant for.

    Those of queries, keys and values are one matrix (3 D, D), and so orthogonalised as one, like
    the two of a SwiGLU. Of a sharded network, ask after it was sharded: its weights are others.
    Modulation stays with AdamW, like embeddings and the final layer outside the blocks: their
    inputs are not a hidden layer's activations. In diffusers' models it is a table of rows or
    belongs to a norm.
    """
    named = [pair for part in blocks for pair in part.named_parameters()]
    return [weight for name, weight in named if weight.ndim == 2 and not _modulates(name)]


def _modulates(name: str) -> bool:
    return any(word in name for word in ("modulation", "scale_shift_table", "norm"))


def hidden_kernels(network: nn.Module, least: int = 8) -> list[Tensor]:
    """Convolution kernels between hidden layers: at least `least` channels on either side."""
    kernels = [w for w in network.parameters() if w.ndim == 4]
    return [w for w in kernels if w.shape[0] >= least and w.shape[1] >= least]
