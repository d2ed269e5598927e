"""Several averages of one network's weights at once."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ldm_core.training.ema import Ema
from ldm_core.training.power_ema import PowerEma


class Averages:
    """Averages by name, updated together: `Averages({"0.999": Ema(network, 0.999), ...})`."""

    def __init__(self, averages: Mapping[str, Ema | PowerEma]) -> None:
        self.by_name = dict(averages)

    def __getitem__(self, name: str) -> Ema | PowerEma:
        return self.by_name[name]

    def update(self, network: nn.Module) -> None:
        """Move all towards the network's present weights."""
        for average in self.by_name.values():
            average.update(network)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By name: the averaged `weights`, which may be shards, and how many `updates` made them.

        The weights are the ones in use: copy them if they are to outlive the next update.
        """
        return {
            name: {"weights": average.state_dict(), "updates": average.updates}
            for name, average in self.by_name.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """What `state_dict` gave, of averages of the same names."""
        for name, average in self.by_name.items():
            average.load_state_dict(state[name]["weights"], state[name]["updates"])
