"""Small runs to save and load, in this process or in others; apart from the tests, so that a
process starts quickly."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm_core.training import checkpoint_tensors
from ldm_core.training.checkpoint_ranks import Ranks
from ldm_core.training.checkpoint_retention import Retention
from ldm_core.training.checkpoint_state import TrainingState
from ldm_core.training.checkpoint_tensors import read_tensors
from ldm_core.training.checkpoints import Checkpoints
from ldm_core.training.ema import Ema
from ldm_core.training.optimizers import Muon
from ldm_core.training.power_ema import PowerEma

ARCHITECTURE = {"class": "Small", "width": 6}
LAYOUTS = ("one", "ddp 2", "fsdp 2", "hsdp 2x2", "fsdp 4", "one")


class Small(nn.Module):
    """Rows that two and four workers do not divide, a vector, a scalar, and a buffer of int64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.second = nn.Linear(6, 5, bias=False)
        self.third = nn.Linear(5, 7, bias=False)
        self.fourth = nn.Linear(7, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.tensor(2**40 + 1))


def new_state(shard: Callable[[nn.Module], object] = lambda network: None) -> TrainingState:
    """A run as it begins; its weights are laid out by `shard` before anything else is made."""
    torch.manual_seed(0)
    network = Small()
    shard(network)
    muon = Muon([weight for weight in network.parameters() if weight.ndim == 2], 0.1)
    adamw = torch.optim.AdamW([network.first.bias, network.scale], 0.1, fused=True)
    averages = {"ema": Ema(network, 0.9), "power": PowerEma(network, 0.1)}
    return TrainingState(network, (muon, adamw), averages)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def go_on(state: TrainingState, first: int, end: int) -> None:
    """Steps with made-up gradients, the same in every layout."""
    for step in range(first, end):
        for i, weight in enumerate(state.network.parameters()):
            weight.grad = as_laid_out(normal(tuple(weight.shape), 100 * step + i), weight)
        for optimizer in state.optimizers:
            optimizer.step()
        for average in state.averages.values():
            average.update(state.network)


def as_laid_out(whole: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    return whole


def whole(state: TrainingState) -> dict[str, Tensor]:
    """Copies of all tensors, put together."""
    tensors = state.tensors()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bits."""
    names = one.keys() ^ other.keys()
    return sorted(
        names | {n for n in one.keys() & other.keys() if not torch.equal(one[n], other[n])}
    )


def stored_bytes(entry: dict[str, Any]) -> int:
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize


class Bytes:
    total = 0


@contextmanager
def bytes_read() -> Iterator[Bytes]:
    """What this process reads of checkpoints' tensors meanwhile; gaps are not read here."""
    read, fetch, gap = Bytes(), checkpoint_tensors._bytes, checkpoint_tensors._GAP

    def counted(uri: str, begin: int, end: int) -> bytearray:
        read.total += end - begin
        return fetch(uri, begin, end)

    checkpoint_tensors._bytes, checkpoint_tensors._GAP = counted, 1
    try:
        yield read
    finally:
        checkpoint_tensors._bytes, checkpoint_tensors._GAP = fetch, gap


@contextmanager
def gloo(rank: int, world: int, rendezvous: str):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


# As threads


def ranks_of_threads(world: int) -> list[Ranks]:
    """Workers that exchange what they give by a list in common."""
    values, barrier = [None] * world, threading.Barrier(world)

    def ranks(rank: int) -> Ranks:
        def exchange(value):
            values[rank] = value
            barrier.wait(60)
            all_values = list(values)
            barrier.wait(60)
            return all_values

        return Ranks(rank, world, exchange)

    return [ranks(rank) for rank in range(world)]


# Through all layouts


def from_layout_to_layout(rank: int, folder: str, barrier) -> None:
    """Be one of four workers: each layout takes over from the one before, checks and saves."""
    torch.set_num_threads(1)
    expected = torch.load(f"{folder}/expected.pt")
    for stage, layout in enumerate(LAYOUTS[1:], start=1):
        kind, _, mesh = layout.partition(" ")
        sides = [int(n) for n in mesh.split("x")] if mesh else [1]
        world = math.prod(sides)
        if rank < world:
            with gloo(rank, world, f"{folder}/rendezvous-{stage}"):
                _take_over(folder, stage, _shard(kind, sides), expected)
        barrier.wait(60)


def _shard(kind: str, sides: list[int]) -> Callable[[nn.Module], object]:
    if kind in ("one", "ddp"):
        return lambda network: None
    names = ("replicate", "shard")[-len(sides) :]
    mesh = init_device_mesh("cpu", tuple(sides), mesh_dim_names=names)

    def shard(network: nn.Module) -> None:
        fully_shard(network.first, mesh=mesh)
        fully_shard(network, mesh=mesh)

    return shard


def _take_over(folder: str, stage: int, shard, expected: dict[int, dict[str, Tensor]]) -> None:
    before, mine = (
        Checkpoints(f"{folder}/{n}", ARCHITECTURE, LAYOUTS[n], Ranks.together())
        for n in (stage - 1, stage)
    )
    found = before.newest()
    assert found is not None
    assert found.manifest.layout == LAYOUTS[stage - 1]
    state = new_state(shard)
    with bytes_read() as read:
        state.load(found)
    by_all = Ranks.together().exchange(read.total)
    stored = sum(map(stored_bytes, found.index.values()))
    assert sum(by_all) == stored, "copies are read by one of their holders, shards by theirs"
    assert max(by_all) < 0.8 * stored or len(by_all) == 1
    assert (wrong := differing(whole(state), expected[stage - 1])) == [], wrong
    assert [average.updates for average in state.averages.values()] == [1 + stage] * 2
    go_on(state, 1 + stage, 2 + stage)
    assert (wrong := differing(whole(state), expected[stage])) == [], wrong
    mine.save(2 + stage, state.tensors(), state.facts())
    mine.wait()


# Killed


def content(step: int) -> dict[str, Tensor]:
    """A few hundred kilobytes that say which step they are of."""
    return {f"model/{i}": torch.full((64, 512), float(step + i)) for i in range(4)}


def save_for_ever(rank: int, world: int, root: str, rendezvous: str, told) -> None:
    """Go on from the newest checkpoint and save at each step, until killed."""
    torch.set_num_threads(1)
    with gloo(rank, world, rendezvous):
        checkpoints = Checkpoints(
            root, ARCHITECTURE, "", Ranks.together(), Retention(2), told=lambda line: os._exit(3)
        )
        found = checkpoints.newest()
        step = found.step if found else 0
        if found:
            assert differing(read_tensors(found, ""), content(step)) == []
        while True:
            step += 1
            checkpoints.save(step, content(step), {"step": step})
            if rank == 0 and checkpoints.last:
                told.put(checkpoints.last.step)
            time.sleep(0.01)


def kill(process) -> None:
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
