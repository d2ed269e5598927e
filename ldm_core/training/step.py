"""One optimiser step: mixed precision, clipping, and a guard that skips what is not finite."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldm_core.errors import UserError
from ldm_core.training.optimizers import Optimizers


def compute_dtype(device: torch.device, precision: Literal["auto", "fp32", "bf16"]) -> torch.dtype:
    """bfloat16 where the device has units for it, float32 elsewhere.

    A CPU has them with AMX; without, bf16 matmuls are emulated and several times slower.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Mixed precision with float32 master weights; nothing at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype)
    return context


@dataclass(frozen=True)
class StepResult:
    """Of one step on this worker: mean loss, gradient norm, and whether it was skipped."""

    loss: float
    gradient_norm: float
    skipped: bool


@dataclass
class TrainingStep:
    """Turns per-sample losses into an update.

    Attributes:
        network: its gradients are clipped to `clip_norm`; wrapped in DDP or not.
        optimizers: stepped if the gradient norm is finite, which takes a finite loss.
        device: of the network.
        dtype: of autocast.
        max_skips: that many bad steps in a row end the run.
    """

    network: nn.Module
    optimizers: Optimizers
    device: torch.device
    dtype: torch.dtype
    clip_norm: float
    max_skips: int = 20
    skipped: int = 0
    _in_a_row: int = 0

    def __call__(self, losses: Callable[[], Tensor], multiplier: float) -> StepResult:
        """Run `losses` -> (B,), its backward pass and the update at `multiplier` x base rate.

        Gradients are averaged over workers before the guard looks, so all workers decide alike.

        Raises:
            UserError: `max_skips` steps in a row were not finite.
        """
        with autocast(self.device, self.dtype):
            loss = losses().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizers.step(multiplier)
        self.optimizers.zero_grad()
        self._count(finite)
        return StepResult(float(loss.detach()), float(norm), not finite)

    def _count(self, finite: bool) -> None:
        self.skipped += not finite
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row >= self.max_skips:
            raise UserError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite; lower "
                "the learning rate, or look for NaN in the latents with a fresh encode"
            )
