"""What several workers hold copies of is read by one of them, who gives it to the others.

Were each to read it, copies on 64 workers would ask the storage for every byte 64 times.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ldm_core.training.checkpoint_folder import Checkpoint
from ldm_core.training.checkpoint_tensors import load_tensors
from ldm_core.training.shards import local


def load_together(checkpoint: Checkpoint, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors by name, in place; all workers call this with the same names in one layout.

    Each reads its share of what it holds as others do, and then they broadcast. Copies agree to
    the last bit, as they are of one reading.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return load_tensors(checkpoint, targets)
    groups = {name: _copies(target) for name, target in targets.items()}
    readers = _readers(checkpoint, groups)
    rank = dist.get_rank()
    load_tensors(checkpoint, {n: each for n, each in targets.items() if readers[n] == rank})
    device = _device(targets.values())
    for name, target in targets.items():
        if groups[name] is not None and (here := local(target)).numel():
            _broadcast(here, readers[name], groups[name], device)


def _copies(tensor: Tensor) -> ProcessGroup | None:
    """The workers that hold the very same; None is this one alone."""
    if not isinstance(tensor, DTensor):
        return dist.group.WORLD
    axes = [i for i, placement in enumerate(tensor.placements) if placement.is_replicate()]
    return tensor.device_mesh.get_group(axes[0]) if axes else None


def _readers(checkpoint: Checkpoint, groups: Mapping[str, ProcessGroup | None]) -> dict[str, int]:
    """The rank that reads each tensor, among those that hold it: equal shares of neighbours.

    In the order in which they lie in the files, so that a file is read by few. Sizes are those of
    whole tensors, which all workers agree upon.
    """

    def place(name: str) -> tuple[str, int]:
        pieces = checkpoint.index[name]["pieces"]
        return min(((file, begin) for _, _, file, begin in pieces), default=("", 0))

    names = sorted(groups, key=place)
    sizes = {name: _bytes(checkpoint.index[name]) for name in names}
    total, before, readers = max(sum(sizes.values()), 1), 0, {}
    for name in names:
        group = groups[name]
        ranks = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        readers[name] = ranks[min(before * len(ranks) // total, len(ranks) - 1)]
        before += sizes[name]
    return readers


def _bytes(entry: Mapping[str, Any]) -> int:
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize


def _device(tensors: Iterable[Tensor]) -> torch.device:
    """Where workers exchange: a GPU if any tensor is there, as NCCL knows no main memory."""
    devices = [local(tensor).device for tensor in tensors]
    return next((each for each in devices if each.type != "cpu"), torch.device("cpu"))


def _broadcast(
    tensor: Tensor, reader: int, group: ProcessGroup | None, device: torch.device
) -> None:
    there = tensor.detach().to(device).contiguous()  # itself, but for an optimiser's counter
    dist.broadcast(there.view(-1).view(torch.uint8), reader, group)  # bytes: of any dtype
    if there.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(there)
