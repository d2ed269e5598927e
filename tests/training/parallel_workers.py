"""What the processes of a group train and say; apart from the tests, as `parallel_runs` is."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from muon_steps import SHAPES, normal, weights_of
from muon_steps import train as muon_train
from parallel_runs import (
    CPU,
    Case,
    evenly,
    joint_mmdit,
    three_heads,
    train,
    unevenly,
    video_dit,
    video_mmdit,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ldm_core.errors import UserError
from ldm_core.training.layout import Layout
from ldm_core.training.optimizers import Muon
from ldm_core.training.parallel import parallelise
from ldm_core.training.power_ema import combine_snapshots
from ldm_core.training.recomputation import recompute_all, recompute_cheap
from ldm_core.training.shards import deal_out, whole, whole_weights

MUON_STEPS = 5  # of Muon alone, of made-up gradients
BAD = 13  # the sample that is not a number, where there is one; of steps 1 and 9
ON_TWO = {
    "ddp": Case(Layout(replicate=2)),
    "fsdp": Case(Layout(shard=2)),
    "ddp twice": Case(Layout(replicate=2), shares=partial(evenly, parts=2)),
    "fsdp twice, recomputed": Case(
        Layout(shard=2), shares=partial(evenly, parts=2), recompute=recompute_all, steps=5
    ),
    "ddp unevenly": Case(Layout(replicate=2), shares=unevenly, steps=5),
    "fsdp unevenly": Case(Layout(shard=2), shares=unevenly, steps=5),
    "ddp bad": Case(Layout(replicate=2), bad=BAD, steps=10),
    "fsdp bad": Case(Layout(shard=2), bad=BAD, steps=10),
    "fsdp adamw": Case(Layout(shard=2), muon=False, steps=5),
    "fsdp bf16": Case(Layout(shard=2), dtype=torch.bfloat16, steps=5),
    "context": Case(Layout(context=2)),
    "context recomputed": Case(Layout(context=2), recompute=recompute_cheap, steps=3),
    "context half frames": Case(Layout(context=2), frames=3, steps=5),
    "context joint": Case(Layout(context=2), make=joint_mmdit, steps=5),
    "context single": Case(Layout(context=2), make=video_mmdit, steps=5),
}
ON_FOUR = {
    "hsdp": Case(Layout(replicate=2, shard=2)),
    "hsdp twice": Case(Layout(replicate=2, shard=2), shares=partial(evenly, parts=2), steps=5),
    "shard context": Case(Layout(shard=2, context=2), steps=5),
    "replicate context": Case(Layout(replicate=2, context=2), steps=5),
    "fsdp four": Case(Layout(shard=4), steps=5),
}
COMPILED = {
    "fsdp compiled": Case(Layout(shard=2), compile=True, recompute=recompute_cheap),
    "context compiled": Case(Layout(context=2), compile=True),
    "context single compiled": Case(
        Layout(context=2), make=video_mmdit, compile=True, recompute=recompute_all
    ),
}
# Shards of averages are put together as those of weights are: of one case of each kind of layout,
# and where whole ones cost nothing. What is held is told where a test asks for it.
AVERAGED = ("ddp", "fsdp", "hsdp", "context", *COMPILED)
HELD = ("ddp", "fsdp", "hsdp", "fsdp four")


def rows_of(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """This worker's rows of a tensor that all of them have: nothing is sent."""
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def sharded_muon(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Muon on rows dealt out to all workers, with the same gradients on each of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole_ones = weights_of(shapes)
    weights = [nn.Parameter(rows_of(w.data, mesh)) for w in whole_ones]
    optimizer = Muon(weights, 0.05, weight_decay=0.1)
    for step in range(MUON_STEPS):
        for i, weight in enumerate(weights):
            gradient = normal(*weight.shape, seed=1000 + 10 * step + i)
            weight.grad = rows_of(gradient, mesh)
        optimizer.step()
    assert all(optimizer.state[w]["momentum"].placements == (Shard(0),) for w in weights)
    return [whole(weight.data) for weight in weights]


def shared_muon(rank: int, world: int) -> list[Tensor]:
    """Muon on whole matrices, of which each worker orthogonalises a share."""
    weights = weights_of()
    muon_train(Muon(weights, 0.05, weight_decay=0.1, rank=rank, world=world), weights, 3)
    return [weight.data for weight in weights]


def dealt_out(rank: int) -> dict[str, Tensor]:
    """Shards of weights that only the first worker ever held, put together again."""
    with torch.device("meta"):
        network = video_dit()
    parallel = parallelise(network, network.blocks, Layout(shard=2), CPU)
    network.to_empty(device=CPU)
    deal_out(network, video_dit().state_dict() if rank == 0 else None)
    assert all(isinstance(weight, DTensor) for weight in parallel.network.parameters())
    return whole_weights(network.state_dict(), keep=rank == 1)


def refusals() -> list[str]:
    """What is said to layouts that cannot be."""
    said = []
    for make, layout in (
        (video_dit, Layout(replicate=3)),
        (three_heads, Layout(context=2)),
        (lambda: nn.Sequential(nn.Linear(1, 1)), Layout(context=2)),
        (lambda: nn.Sequential(nn.Linear(1, 1)), Layout(shard=2)),
    ):
        network = make()
        try:
            parallelise(network, network.children(), layout, CPU)
        except UserError as error:
            said.append(str(error))
    return said


def combined() -> Tensor:
    """Of snapshots that are shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    snapshots = [{"w": rows_of(normal(5, 3, seed=i), mesh)} for i in range(3)]
    return whole(combine_snapshots(snapshots, SNAPSHOT_SHARES)["w"])


SNAPSHOT_SHARES = torch.tensor([0.7, -0.2, 0.5])


def be_one_of(rank: int, folder: str) -> None:
    """Be one of four processes, the first two of which also work as a pair."""
    outcomes = in_group(rank, 2, ON_TWO, folder) if rank < 2 else {}
    outcomes |= in_group(rank, 4, ON_FOUR, folder)
    torch.save(outcomes, Path(folder, f"{rank}.pt"))


def be_one_of_two_that_compile(rank: int, folder: str) -> None:
    torch.save(in_group(rank, 2, COMPILED, folder), Path(folder, f"{rank}.pt"))


def in_group(rank: int, world: int, cases: dict[str, Case], folder: str) -> dict[str, Any]:
    """What one of `world` processes has to show."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    outcomes: dict[str, Any] = {
        name: train(case, with_averages=name in AVERAGED, with_held=name in HELD).__dict__
        for name, case in cases.items()
    }
    outcomes[f"muon {world}"] = sharded_muon(SHAPES)
    outcomes[f"lone muon {world}"] = sharded_muon(SHAPES[:1])
    outcomes[f"shared muon {world}"] = shared_muon(rank, world)
    outcomes[f"combined {world}"] = combined()
    if world == 2:
        outcomes |= {"dealt out": dealt_out(rank), "refusals": refusals()}
    dist.destroy_process_group()
    return outcomes
