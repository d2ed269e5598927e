"""Adapters trained on several processes; apart from the tests, so that a worker starts quickly."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_runs import BATCH, CPU, Case, arranged, evenly, sample_losses, video_dit, video_mmdit
from torch import Tensor, nn

from ldm_core.training.adapter_weights import AdaptersOf
from ldm_core.training.checkpoint_ranks import Ranks
from ldm_core.training.checkpoint_state import TrainingState
from ldm_core.training.checkpoints import Checkpoints
from ldm_core.training.ema import Ema
from ldm_core.training.layout import Layout
from ldm_core.training.lora import add_lora
from ldm_core.training.optimizers import adamw
from ldm_core.training.recomputation import recompute_all
from ldm_core.training.shards import whole_weights
from ldm_core.training.step import TrainingStep

STEPS = 6


def adapted(make: Callable[[], nn.Module], rank: int = 2) -> nn.Module:
    """With draws of its own for A, the same on every worker."""
    network = make()
    torch.manual_seed(7)
    add_lora(network, rank, rank)
    return network


adapted_dit, adapted_mmdit = partial(adapted, video_dit), partial(adapted, video_mmdit)
CASES = {
    "ddp": Case(Layout(replicate=2), make=adapted_dit),
    "fsdp": Case(Layout(shard=2), make=adapted_dit, shares=partial(evenly, parts=2)),
    "fsdp, a row for two": Case(Layout(shard=2), make=partial(adapted, video_dit, rank=1)),
    "fsdp recomputed": Case(Layout(shard=2), make=adapted_mmdit, recompute=recompute_all),
    "context": Case(Layout(context=2), make=adapted_dit),
}


def train(case: Case, root: str = "") -> dict[str, dict[str, Tensor]]:
    """Weights and averages at the end, on the first worker; a checkpoint at `root`, if given."""
    parallel = arranged(case)
    network = parallel.network
    step_of = TrainingStep(
        network, adamw(network, 1e-2), CPU, torch.float32, 1.0, parallel=parallel
    )
    average = Ema(AdaptersOf(network), 0.9)
    for step in range(STEPS):
        ids = [step * BATCH + i for i in range(BATCH)]
        shares = case.shares(step, ids, parallel.data_rank, case.layout.data_world)
        step_of(
            [partial(sample_losses, parallel.model, case, step, own) for own in shares], 1, BATCH
        )
        average.update(network)
    if root:
        state = TrainingState(network, (), {"ema": average}, trained_only=True)
        made = Checkpoints(root, {}, ranks=Ranks.together())
        made.save(STEPS, state.tensors(), state.facts())
        made.wait()
    first = parallel.rank == 0
    return {
        "weights": whole_weights(network.state_dict(), first),
        "average": whole_weights(average.state_dict(), first),
    }


def be_one_of_two(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/two", rank=rank, world_size=2)
    outcomes = {name: train(case, str(Path(folder, name))) for name, case in CASES.items()}
    torch.save(outcomes, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
