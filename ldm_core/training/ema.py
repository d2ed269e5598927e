"""An exponential moving average of a network's weights."""

import torch
from torch import Tensor, nn

from ldm_core.training.shards import local


class Ema:
    """Averages parameters with decay min(decay, (1 + k) / (10 + k)) at step k.

    The warm-up lets the average forget the initial weights, which a long memory would drag along.
    Of a sharded network each worker averages what it holds: make it after sharding.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in network.state_dict().items()}

    def update(self, network: nn.Module) -> None:
        """Move towards the network's present weights."""
        beta = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        move_towards(self.shadow, network, 1 - beta)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, loadable into the network, by name."""
        return self.shadow

    def load_state_dict(self, weights: dict[str, Tensor], updates: int) -> None:
        """Continue from saved averages after `updates` updates."""
        self.updates = updates
        for name, value in weights.items():
            self.shadow[name].copy_(value)


@torch.no_grad()
def move_towards(shadow: dict[str, Tensor], network: nn.Module, share: float) -> None:
    """shadow <- (1 - share) shadow + share weights, in place; what is not floating keeps still."""
    current = network.state_dict()
    averaged = [name for name, value in shadow.items() if value.is_floating_point()]
    torch._foreach_lerp_(
        [local(shadow[name]) for name in averaged],
        [local(current[name].detach()) for name in averaged],
        share,
    )
