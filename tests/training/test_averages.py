import pytest
import torch
from torch import nn

from ldm_core.training.averages import Averages
from ldm_core.training.ema import Ema
from ldm_core.training.power_ema import PowerEma, average_of_width
from ldm_core.training.shards import whole_weights


class Walk(nn.Module):
    """A weight that goes its way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def at(self, step):
        generator = torch.Generator().manual_seed(step)
        self.weight.data += torch.randn(3, dtype=torch.float64, generator=generator)
        return self


def new(network):
    return Averages(
        {"0.9": Ema(network, 0.9), "0.99": Ema(network, 0.99), "0.1": PowerEma(network, 0.1)}
    )


def test_several_are_what_each_is_alone():
    network = Walk()
    together, alone = new(network), {"0.9": Ema(network, 0.9), "0.1": PowerEma(network, 0.1)}
    for step in range(120):  # past the warm-up of 0.9
        network.at(step)
        together.update(network)
        for average in alone.values():
            average.update(network)
    for name, average in alone.items():
        assert torch.equal(together[name].shadow["weight"], average.shadow["weight"])
    assert not torch.equal(together["0.99"].shadow["weight"], together["0.9"].shadow["weight"])


def test_restored_they_go_on():
    network = Walk()
    whole, halves = new(network), new(network)
    for step in range(20):
        network.at(step)
        whole.update(network)
        halves.update(network)
        if step == 7:
            again = new(Walk())
            again.load_state_dict(halves.state_dict())
            halves = again
    for name in whole.by_name:
        assert torch.equal(halves[name].shadow["weight"], whole[name].shadow["weight"])
        assert halves[name].updates == 20


def test_kept_weights_are_copies():
    ema = Ema(Walk(), 0.9)
    kept = whole_weights(ema.state_dict(), keep=True)
    ema.shadow["weight"].fill_(5.0)
    assert torch.equal(kept["weight"], torch.zeros(3, dtype=torch.float64))
    assert whole_weights(ema.state_dict(), keep=False) == {}


def test_any_width_after_the_fact():
    network, steps, every = Walk(), 512, 32
    tracked = {std: PowerEma(network, std) for std in (0.05, 0.10, 0.07)}
    snapshots, updates, widths = [], [], []
    for step in range(1, steps + 1):
        network.at(step)
        for average in tracked.values():
            average.update(network)
        for std in (0.05, 0.10) if step % every == 0 else ():
            snapshots.append({n: w.clone() for n, w in tracked[std].state_dict().items()})
            updates.append(step)
            widths.append(std)
    found = average_of_width(snapshots, updates, widths, steps, 0.07)["weight"]
    truth = tracked[0.07].state_dict()["weight"]
    others = [(tracked[std].shadow["weight"] - truth).norm() for std in (0.05, 0.10)]
    assert (found - truth).norm() < 0.1 * min(others)
    with pytest.raises(ValueError, match="at 600 cannot be made of snapshots up to 512"):
        average_of_width(snapshots, updates, widths, 600, 0.07)
