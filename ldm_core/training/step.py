"""One optimiser step over all workers: micro-batches, mixed precision, clipping, and a guard that
skips what is not finite or far too large."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_core.errors import UserError
from ldm_core.training.guard import SpikeGuard
from ldm_core.training.layout import Layout
from ldm_core.training.optimizers import Optimizers
from ldm_core.training.parallel import Parallel
from ldm_core.training.shards import whole

Losses = Callable[[], Tensor]


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
    """Of one step: mean loss, gradient norm, and whether it was skipped; alike on all workers.

    Without a layout, the loss is that of this worker's samples.
    """

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
        parallel: the network in its layout; None for one worker, or where somebody else averages
            the gradients of workers that hold as many samples each.
        guard: refuses finite but outlying gradient norms.
        skipped: bad steps so far, `spikes` of which the guard refused.
    """

    network: nn.Module
    optimizers: Optimizers
    device: torch.device
    dtype: torch.dtype
    clip_norm: float
    max_skips: int = 20
    skipped: int = 0
    parallel: Parallel | None = None
    guard: SpikeGuard | None = None
    spikes: int = 0
    _in_a_row: int = 0

    def __call__(
        self,
        losses: Losses | Sequence[Losses],
        multiplier: float,
        total: int | None = None,
        passes: int | None = None,
        spare: Losses | None = None,
    ) -> StepResult:
        """Run the losses, their backward passes and the update at `multiplier` x base rate.

        The update is that of the mean loss over all samples of the step, wherever they are.
        Gradients are summed over workers before the guard looks, so all workers decide alike.

        Args:
            losses: this worker's micro-batches, each -> (B,), or the one there is.
            multiplier: of the learning rates.
            total: samples of the step over all workers, those of a context counted once; may be
                left out for one micro-batch if all workers hold as many samples.
            passes: the most micro-batches of any worker; None asks them.
            spare: what a worker that has fewer does meanwhile, since workers exchange shards in
                every pass; it counts nothing. Left out, it does its last one again.

        Raises:
            UserError: `max_skips` steps in a row were bad.
        """
        parallel = self.parallel or Parallel(self.network, self.network, Layout(), self.device)
        own = [losses] if callable(losses) else list(losses)
        assert total is not None or len(own) == 1, "several micro-batches need their total"
        count = parallel.most(len(own)) if passes is None else passes
        loss = self._accumulate(parallel, own, spare, count, total)
        norm = self._clip()
        mean, size = parallel.mean(torch.stack([loss, norm])).tolist()
        fine = self._fine(size)
        if fine:
            self.optimizers.step(multiplier)
        self.optimizers.zero_grad()
        self._count(fine)
        return StepResult(mean, size, not fine)

    def _accumulate(
        self, parallel: Parallel, own: list[Losses], spare: Losses | None, count: int, total: Any
    ) -> Tensor:
        """Leave the gradients behind; returns this worker's part of the mean loss."""
        assert count >= len(own), f"{len(own)} micro-batches in {count} passes"
        filling = spare or (own[-1] if own else None)
        assert count == len(own) or filling is not None, "a worker without samples needs a spare"
        loss = torch.zeros((), device=self.device)
        for index in range(count):
            with parallel.accumulating(last=index == count - 1):
                with autocast(self.device, self.dtype):
                    each = (own[index] if index < len(own) else filling)()  # type: ignore[misc]
                samples = total or len(each) * parallel.layout.data_world
                share = each.sum() / parallel.divisor(samples)
                share = share if index < len(own) else 0 * share
                share.backward()
                loss += share.detach()
        return loss

    def _clip(self) -> Tensor:
        """Bound the gradient norm; returns what it was."""
        weights = list(self.network.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grads_with_norm_(weights, self.clip_norm, norm)
        return norm

    def _fine(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return False
        spike = self.guard is not None and self.guard.refuses(norm)
        self.spikes += spike
        return not spike

    def _count(self, fine: bool) -> None:
        self.skipped += not fine
        self._in_a_row = 0 if fine else self._in_a_row + 1
        if self._in_a_row >= self.max_skips:
            raise UserError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite, or "
                "far larger than before; lower the learning rate, or look for NaN in the latents "
                "with a fresh encode"
            )

    def state_dict(self) -> dict[str, Any]:
        """What was counted and remembered, as plain numbers; neither weights nor optimisers."""
        counts = {"skipped": self.skipped, "spikes": self.spikes, "in_a_row": self._in_a_row}
        return counts | ({"guard": self.guard.state_dict()} if self.guard else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self._in_a_row = state["in_a_row"]
        if self.guard and "guard" in state:
            self.guard.load_state_dict(state["guard"])
