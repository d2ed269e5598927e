"""What a worker holds of a sharded tensor, and the whole of it again."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, Shard


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This worker's shard, sharing memory; of a plain tensor, itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The tensor put together again, on every worker; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(weights: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Put weights together one by one, in main memory, on the workers that `keep` them.

    All workers call this; the others hold one whole tensor at a time.

    Returns:
        Copies by name, in the order given; nothing on a worker that does not keep them.
    """
    kept = {}
    for name, weight in weights.items():
        full = whole(weight.detach())
        if keep:
            kept[name] = full.to("cpu", copy=True)
    return kept


def give_memory(network: nn.Module, device: torch.device) -> None:
    """Move a network that was built `without_weights` to a device, where its weights are then
    whatever the memory held. Buffers keep their numbers.
    """
    buffers = {name: buffer for name, buffer in network.named_buffers() if not buffer.is_meta}
    network.to_empty(device=device)
    for name, buffer in network.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def deal_out(network: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Load whole weights, which only the first worker has, into a network of shards.

    So that no other worker ever holds the whole: build it `without_weights`, `parallelise` it,
    `give_memory` to it, and then call this on all workers.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, dict(weights or {}), options=options)


def shard_group(tensor: DTensor) -> ProcessGroup:
    """The workers that hold the shards of one copy of a tensor, cut along its first dimension."""
    [axis] = [i for i, placement in enumerate(tensor.placements) if placement == Shard(0)]
    return tensor.device_mesh.get_group(axis)


def shard_rows(rows: int, world: int) -> list[int]:
    """How many of the rows each worker holds, as torch.chunk cuts them: the last may hold none."""
    most = -(-rows // world)
    return [max(0, min(most, rows - rank * most)) for rank in range(world)]


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this worker's shards."""
    return sum(local(tensor).nbytes for tensor in tensors)
