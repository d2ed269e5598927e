"""Averages of any length after the fact, out of snapshots of two on the way (Karras et al. 2024).

Snapshots are checkpoints of the averages alone, in a folder of their own, all of which stay:

```
snapshots = Checkpoints(join(root, "snapshots"), architecture, ranks=…, retention=Retention(None))
snapshots.save(step, *snapshot({"0.05": ema_a, "0.10": ema_b}))
weights = average_of_length(join(root, "snapshots"), 0.075)
```
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.training.checkpoint_newest import sound
from ldm_core.training.checkpoint_state import AVERAGE
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.power_ema import PowerEma, power_exponent, snapshot_shares


def snapshot(averages: Mapping[str, PowerEma]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `Checkpoints.save` is given to keep the averages as they are now."""
    tensors = {
        f"{AVERAGE}{title}/{name}": value
        for title, average in averages.items()
        for name, value in average.state_dict().items()
    }
    profiles = {title: [a.updates, a.exponent] for title, a in averages.items()}
    return tensors, {"profiles": profiles}


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
    kept = [
        (checkpoint, title, float(time), float(exponent))
        for checkpoint in sound(root, told)
        for title, (time, exponent) in checkpoint.state["profiles"].items()
        if time
    ]
    if not kept:
        raise UserError(f"no snapshots at {root}: averages after the fact need some of the way")
    times, exponents = (torch.tensor([k[i] for k in kept], dtype=torch.float64) for i in (2, 3))
    shares = snapshot_shares(times, exponents, float(times.max()), power_exponent(std))
    total: dict[str, Tensor] = {}
    latest = int(times.argmax())
    last = read_tensors(kept[latest][0], f"{AVERAGE}{kept[latest][1]}/")
    for share, (checkpoint, title, _, _) in zip(shares.tolist(), kept, strict=True):
        for name, value in read_tensors(checkpoint, f"{AVERAGE}{title}/").items():
            if value.is_floating_point():
                term = share * value.double()
                total[name] = total[name] + term if name in total else term
    return {name: total[name].to(w.dtype) if name in total else w for name, w in last.items()}
