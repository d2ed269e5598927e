"""A training run as tensors by name and the rest as JSON, and back, in any layout.

Names say the kind first: `model/W`, `optimizer/exp_avg/W`, `average/ema/W` for a weight W of the
network. What wrappers add to W's own name is left out, so that it is the same in every layout.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ldm_core.errors import UserError
from ldm_core.training.checkpoint_copies import load_together
from ldm_core.training.checkpoint_folder import Checkpoint

MODEL, OPTIMIZER, AVERAGE = "model/", "optimizer/", "average/"
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # of compiling, of recomputing


def architecture_of(network: nn.Module) -> dict[str, Any]:
    """What a network of ours is, as JSON: its class and configuration."""
    config = network.config
    assert isinstance(config, BaseModel), type(config)
    return {"class": type(network).__name__, **config.model_dump(mode="json")}


class Average(Protocol):
    """What `Ema` and `PowerEma` are."""

    updates: int

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights themselves, not copies."""

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Go on from these after so many updates."""


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds of a run.

    Attributes:
        network: with its master weights, in whatever layout; itself, not DDP around it.
        optimizers: between them each weight at most once.
        averages: of the weights, by a name that is the same when the run goes on.
        trained_only: whether frozen weights are left out, as of a network with adapters, which then
            begins again with the weights it began with.
    """

    network: nn.Module
    optimizers: Sequence[torch.optim.Optimizer] = ()
    averages: Mapping[str, Average] = field(default_factory=dict)
    trained_only: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of the run, not copies."""
        states = {
            f"{OPTIMIZER}{kind}/{name}": value
            for optimizer, name, weight in self._optimized()
            for kind, value in optimizer.state.get(weight, {}).items()
        }
        return self._weights() | states

    def facts(self) -> dict[str, Any]:
        """What belongs to the tensors and is none, as JSON."""
        return {
            "averages": {name: average.updates for name, average in self.averages.items()},
            "optimizers": self._kinds(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's tensors and updates, in place; all workers call this.

        Raises:
            UserError: it has other averages, or another optimiser for a weight.
        """
        facts = checkpoint.state
        self._check(checkpoint, facts)
        load_together(checkpoint, self._weights())
        for name, average in self.averages.items():
            average.load_state_dict(average.state_dict(), facts["averages"][name])
        for optimizer in self.optimizers:
            self._load_optimizer(optimizer, checkpoint)

    def _weights(self) -> dict[str, Tensor]:
        sources = {MODEL: self.network.state_dict()}
        for title, average in self.averages.items():
            sources[f"{AVERAGE}{title}/"] = average.state_dict()
        frozen = self._frozen() if self.trained_only else set()
        return {
            kind + name: value
            for kind, weights in sources.items()
            for name, value in _named(weights)
            if name not in frozen
        }

    def _frozen(self) -> set[str]:
        named = _named(dict(self.network.named_parameters()))
        return {name for name, weight in named if not weight.requires_grad}

    def _optimized(self) -> Iterator[tuple[torch.optim.Optimizer, str, Tensor]]:
        """Every optimised weight with its name."""
        names = {id(weight): name for name, weight in _named(dict(self.network.named_parameters()))}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    yield optimizer, names[id(weight)], weight

    def _kinds(self) -> dict[str, str]:
        return {name: type(optimizer).__name__ for optimizer, name, _ in self._optimized()}

    def _check(self, checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
        if set(facts["averages"]) != set(self.averages):
            raise UserError(
                f"{checkpoint.uri} holds the averages {sorted(facts['averages'])}, this run keeps "
                f"{sorted(self.averages)}: go on with the settings it was begun with"
            )
        for name, kind in self._kinds().items():
            if (former := facts["optimizers"].get(name)) != kind:
                raise UserError(
                    f"{checkpoint.uri} was written with {former} for {name}, this run has {kind}: "
                    "go on with the optimiser it was begun with"
                )

    def _load_optimizer(self, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
        """Give every weight the state that is stored for it, laid out as the weight is."""
        stored = _stored_kinds(checkpoint)
        state: dict[int, dict[str, Tensor]] = {}
        targets: dict[str, Tensor] = {}
        mine = [(name, weight) for owner, name, weight in self._optimized() if owner is optimizer]
        for number, (name, weight) in enumerate(mine):
            for kind in stored.get(name, ()):
                full = f"{OPTIMIZER}{kind}/{name}"
                state.setdefault(number, {})[kind] = targets[full] = _like(
                    weight, checkpoint.index[full]
                )
        load_together(checkpoint, targets)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _stored_kinds(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Which states are stored for each weight."""
    kinds: dict[str, list[str]] = {}
    for full in checkpoint.index:
        if full.startswith(OPTIMIZER):
            kind, _, name = full.removeprefix(OPTIMIZER).partition("/")
            kinds.setdefault(name, []).append(kind)
    return kinds


def _like(weight: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """Room for a state: spread as the weight if it has its shape, else whole."""
    dtype = getattr(torch, entry["dtype"])
    if tuple(entry["shape"]) == tuple(weight.shape):
        return torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return torch.empty(entry["shape"], dtype=dtype)


def _named(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        yield name, value
