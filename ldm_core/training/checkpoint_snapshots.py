"""Averages of any length after the fact, out of snapshots of two on the way (Karras et al. 2024).

Snapshots are checkpoints of the averages alone, in a folder of their own, all of which stay:

```
snapshots = Checkpoints(join(root, "snapshots"), architecture, ranks=…, retention=Retention(None))
snapshots.save(step, *snapshot({"0.05": ema_a, "0.10": ema_b}))
weights = average_of_length(join(root, "snapshots"), 0.075)
```
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.training.checkpoint_folder import Checkpoint
from ldm_core.training.checkpoint_newest import sound
from ldm_core.training.checkpoint_state import AVERAGE
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.power_ema import (
    PowerEma,
    power_exponent,
    profile_error,
    snapshot_shares,
)


def snapshot(averages: Mapping[str, PowerEma]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `Checkpoints.save` is given to keep the averages as they are now."""
    tensors = {
        f"{AVERAGE}{title}/{name}": value
        for title, average in averages.items()
        for name, value in average.state_dict().items()
    }
    profiles = {title: [a.updates, a.exponent] for title, a in averages.items()}
    return tensors, {"profiles": profiles}


@dataclass(frozen=True)
class Snapshot:
    """An average as it was on the way.

    Attributes:
        checkpoint: that holds it.
        title: its name there.
        time: updates that made it.
        exponent: of its profile.
    """

    checkpoint: Checkpoint
    title: str
    time: float
    exponent: float

    def weights(self) -> dict[str, Tensor]:
        """By name, in host memory."""
        return read_tensors(self.checkpoint, f"{AVERAGE}{self.title}/")


def snapshots_at(root: str, told: Callable[[str], None] = warnings.warn) -> list[Snapshot]:
    """All averages that were kept there, the newest first.

    Files are known by their sizes alone: they may be terabytes, which to hash is to read twice.

    Args:
        root: of the snapshots; damaged ones are told of and left out.
        told: is given one line for each damaged snapshot.

    Raises:
        UserError: no snapshots there.
    """
    kept = [
        Snapshot(checkpoint, title, float(time), float(exponent))
        for checkpoint in sound(root, told, hashes=False)
        for title, (time, exponent) in checkpoint.state["profiles"].items()
        if time
    ]
    if not kept:
        raise UserError(f"no snapshots at {root}: averages after the fact need some of the way")
    return kept


def average_of_length(
    root: str, std: float, told: Callable[[str], None] = warnings.warn
) -> dict[str, Tensor]:
    """The average with another width at the last snapshot, in host memory.

    Args:
        root: of the snapshots; damaged ones are told of and left out.
        std: width wanted, relative to the length of training.
        told: is given one line for each damaged snapshot.

    Raises:
        UserError: no snapshots there.
    """
    return average_of(snapshots_at(root, told), std)[0]


def average_of(kept: Sequence[Snapshot], std: float) -> tuple[dict[str, Tensor], float]:
    """The average with another width at the last of some snapshots, in host memory.

    Returns:
        The weights, and how far the profile they are averaged with is from the one of that width:
        the L2 norm of the difference over that of the profile.
    """
    times, exponents = (
        torch.tensor([getattr(each, name) for each in kept], dtype=torch.float64)
        for name in ("time", "exponent")
    )
    latest, wanted = int(times.argmax()), power_exponent(std)
    time = float(times[latest])
    shares = snapshot_shares(times, exponents, time, wanted)
    total: dict[str, Tensor] = {}
    last: dict[str, Tensor] = {}  # what is averaged is there as a dtype alone
    for k, (share, each) in enumerate(zip(shares.tolist(), kept, strict=True)):
        for name, value in each.weights().items():
            floating = value.is_floating_point()
            if k == latest:
                last[name] = value.new_empty(0) if floating else value
            if floating:
                term = share * value.double()
                total[name] = total[name] + term if name in total else term
    weights = {name: total[name].to(w.dtype) if name in total else w for name, w in last.items()}
    return weights, profile_error(times, exponents, shares, time, wanted)
