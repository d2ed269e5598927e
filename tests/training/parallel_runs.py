"""Short trainings on several processes; apart from the tests, so that a worker starts quickly.

Whatever the layout and however samples are dealt out, they are the same samples, draws and initial
weights, so that the curves are to be those of one process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from muon_steps import normal
from torch import Tensor, nn

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.conditioning.text import TextCondition
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.training.averages import Averages
from ldm_core.training.ema import Ema
from ldm_core.training.guard import SpikeGuard
from ldm_core.training.layout import Layout
from ldm_core.training.optimizers import adamw, hidden_matrices, muon_and_adamw
from ldm_core.training.parallel import Parallel, parallelise
from ldm_core.training.power_ema import PowerEma
from ldm_core.training.recomputation import Recompute
from ldm_core.training.schedules import warmup_then_decay
from ldm_core.training.shards import held_bytes, whole_weights
from ldm_core.training.step import TrainingStep

CPU = torch.device("cpu")
STEPS, BATCH = 20, 8
Shares = Callable[[int, list[int], int], list[list[int]]]


def opened(network: nn.Module) -> nn.Module:
    """Add noise to every parameter, so that none is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def video_dit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = DiTConfig(
        in_channels=2, latent_size=(4, 4), patch_size=2, width=32, depth=depth, heads=4,
        text_width=5, pooled_width=3, text_depth=1, frame_pairs=2,
    )  # fmt: skip
    return opened(DiT(config))


def three_heads() -> nn.Module:
    config = DiTConfig(
        in_channels=2, latent_size=(4, 4), patch_size=2, width=24, depth=1, heads=3,
        text_width=5, pooled_width=3,
    )  # fmt: skip
    return DiT(config)


def video_mmdit() -> nn.Module:
    torch.manual_seed(0)
    config = MMDiTConfig(
        in_channels=2, patch_size=2, width=32, depth=2, heads=4, single_depth=1,
        text_width=5, pooled_width=3, rotary=(4, 2, 2),
    )  # fmt: skip
    return opened(MMDiT(config))


def joint_mmdit() -> nn.Module:
    torch.manual_seed(0)
    config = MMDiTConfig(
        in_channels=2, patch_size=2, width=32, depth=2, heads=4, text_width=5, pooled_width=3,
        rotary=(4, 2, 2),
    )  # fmt: skip
    return opened(MMDiT(config))


def evenly(step: int, ids: list[int], rank: int, world: int, parts: int = 1) -> list[list[int]]:
    mine = ids[rank::world]
    return [mine[part::parts] for part in range(parts)]


def unevenly(step: int, ids: list[int], rank: int, world: int) -> list[list[int]]:
    """Three micro-batches of 3, 2 and 1 samples for one of two workers, one for the other."""
    first, second = [ids[:3], ids[3:5], ids[5:6]], [ids[6:]]
    if step % 5 == 3:  # or nothing at all
        first, second = [*first, *second], []
    return [first, second][(rank + step) % 2] if world == 2 else [*first, *second]


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is laid out."""

    layout: Layout
    make: Callable[[], nn.Module] = video_dit
    frames: int = 4
    shares: Callable[..., list[list[int]]] = evenly
    recompute: Recompute | None = None
    bad: int | None = None
    dtype: torch.dtype = torch.float32
    muon: bool = True
    compile: bool = False
    steps: int = STEPS


@dataclass
class Outcome:
    """Of a training on one worker; weights and averages are there on the first only.

    Averages and what is held are told where they were asked for.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


def alone(case: Case) -> Case:
    """The same training by one process, every step as one batch."""
    return replace(case, layout=Layout(), shares=evenly, recompute=None, compile=False)


def sample_losses(model: nn.Module, case: Case, step: int, ids: list[int]) -> Tensor:
    """Flow matching; every sample's inputs follow from its number and the step."""
    shape = (2, case.frames, 4, 4)
    x0 = torch.stack([normal(*shape, seed=i) for i in ids])
    eps = torch.stack([normal(*shape, seed=10_000 + 1000 * step + i) for i in ids])
    if case.bad in ids:
        x0[ids.index(case.bad)] = float("nan")
    t = torch.stack([normal(1, seed=77 + 1000 * step + i)[0] for i in ids]).sigmoid()
    tokens = torch.stack([normal(3, 5, seed=500 + i) for i in ids])
    mask = torch.tensor([[True, i % 2 == 0, i % 3 == 0] for i in ids])
    pooled = torch.stack([normal(3, seed=900 + i) for i in ids])
    return flow_matching_loss(model, x0, eps, t, TextCondition(tokens, mask, pooled))


def arranged(case: Case) -> Parallel:
    network = case.make()
    blocks = [block for part in lists_of_blocks(network) for block in part]
    return parallelise(
        network, blocks, case.layout, CPU, case.dtype, case.recompute,
        compile=case.compile, backend="aot_eager",
    )  # fmt: skip


def lists_of_blocks(network: nn.Module) -> list[nn.Module]:
    return [part for name, part in network.named_children() if "blocks" in name]


def optimizers_of(parallel: Parallel, case: Case):
    network = parallel.network
    if not case.muon:
        return adamw(network, 3e-3, 0.01)
    matrices = hidden_matrices(*lists_of_blocks(network))
    return muon_and_adamw(
        network, matrices, 3e-3, 0.01, rank=parallel.rank, world=case.layout.world
    )


def train(case: Case, with_averages: bool = False, with_held: bool = False) -> Outcome:
    """Train as the case says.

    Args:
        case: what, and on how many workers; all of them call this.
        with_averages: whether averages are put together, too, tensor by tensor.
        with_held: whether the bytes that this worker holds are told; it takes one more pass.
    """
    parallel, outcome = arranged(case), Outcome()
    network, optimizers = parallel.network, optimizers_of(parallel, case)
    averages = Averages({"0.9": Ema(network, 0.9), "power": PowerEma(network, 0.1)})
    guard = SpikeGuard(factor=50)
    step_of = TrainingStep(
        network, optimizers, CPU, case.dtype, clip_norm=1.0, parallel=parallel, guard=guard
    )
    for step in range(case.steps):
        ids = [(step * BATCH + i) % 64 for i in range(BATCH)]
        shares = case.shares(step, ids, parallel.data_rank, case.layout.data_world)
        losses = [partial(sample_losses, parallel.model, case, step, own) for own in shares]
        spare = partial(sample_losses, parallel.model, case, step, [0])
        rate = warmup_then_decay(step, STEPS, 5, 0.4)
        result = step_of(losses, rate, total=BATCH, spare=spare)
        averages.update(network)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.gradient_norm)
        outcome.skipped.append(result.skipped)
    if with_held:
        outcome.held = held(parallel, case, optimizers, averages)
    keep = parallel.rank == 0
    outcome.weights = whole_weights(network.state_dict(), keep)
    if with_averages:
        outcome.averages = {
            name: whole_weights(average.state_dict(), keep)
            for name, average in averages.by_name.items()
        }
    return outcome


def held(parallel: Parallel, case: Case, optimizers, averages: Averages) -> dict[str, int]:
    """Bytes that this worker holds of each kind."""
    sample_losses(parallel.model, case, 0, [0, 1]).sum().backward()
    weights = list(parallel.network.parameters())
    states = [
        value
        for optimizer in optimizers.all
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim > 0
    ]
    shadows = [w for average in averages.by_name.values() for w in average.shadow.values()]
    return {
        "parameters": held_bytes(weights),
        "gradients": held_bytes([w.grad for w in weights]),
        "optimiser": held_bytes(states),
        "averages": held_bytes(shadows),
    }
