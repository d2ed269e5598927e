"""A network on many workers: copies (DDP), shards (FSDP2), or both (HSDP), and dealt-out tokens.

Whatever the layout, every worker's backward pass adds to the gradient of one objective, the mean
over the samples of the global step, and afterwards each holds the whole of it, or its shard.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ldm_core.backbones.context import Context
from ldm_core.errors import UserError
from ldm_core.training.float8 import compute_in_float8
from ldm_core.training.layout import Layout
from ldm_core.training.optimizers import hidden_matrices
from ldm_core.training.recomputation import Recompute


@dataclass(frozen=True)
class Parallel:
    """A network in its layout, as one worker sees it.

    Attributes:
        network: whose parameters, or their shards, are optimised, averaged and saved.
        model: what is called to predict.
        layout: of all workers.
        device: of this worker.
    """

    network: nn.Module
    model: nn.Module
    layout: Layout
    device: torch.device

    @property
    def rank(self) -> int:
        """Of this worker, among all."""
        return dist.get_rank() if self.layout.world > 1 else 0

    @property
    def data_rank(self) -> int:
        """Which of the layout's `data_world` shares of the samples this worker is given."""
        return self.layout.data_rank(self.rank)

    def divisor(self, total: int) -> float:
        """What a sum of losses is divided by for gradients of the mean over `total` samples.

        Workers' gradients are averaged, and each sample is seen by `context` of them.
        """
        return total * self.layout.context / self.layout.world

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """For the passes of a step: workers exchange gradients in the `last` of them.

        Shards are exchanged in all of them, or each worker would hold a whole gradient meanwhile;
        copies of shards in the last.
        """
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_all_reduce(last)
            self.network.set_is_last_backward(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all workers, the same on each of them to the last bit."""
        if self.layout.world > 1:
            dist.all_reduce(values)
        return values / self.layout.world

    def most(self, count: int) -> int:
        """The largest of all workers' counts."""
        if self.layout.world == 1:
            return count
        counts = torch.tensor(count, device=self.device)
        dist.all_reduce(counts, dist.ReduceOp.MAX)
        return int(counts)


def parallelise(
    network: nn.Module,
    blocks: Iterable[nn.Module],
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
    compile: bool = False,
    float8: bool = False,
    backend: str = "inductor",
) -> Parallel:
    """Arrange a network over the workers of the default process group, in place.

    All workers call this with the same weights. Shards are new parameters: make optimisers and
    averages afterwards.

    Args:
        network: on the device, float32.
        blocks: its transformer blocks, the units of recomputation, compilation and sharding.
        layout: of the workers.
        device: of this worker, the current one of its kind.
        dtype: of computation; weights, gradients and their exchange stay float32. Losses are to be
            computed under `autocast` of it, too.
        recompute: what is done to each block to save memory, e.g. `recompute_all`.
        compile: whether blocks are compiled.
        float8: whether the blocks' matrix products are computed in 8 bits.
        backend: of the compiler.

    Raises:
        UserError: the layout does not fit the workers or the network, or no float8 here.
    """
    blocks = list(blocks)
    world = dist.get_world_size() if dist.is_initialized() else 1
    layout.check(world, rows=_fewest_rows(blocks))
    if float8:
        compute_in_float8(blocks, device)
    if layout.context > 1:
        _spread_tokens(network, layout, device)
    for block in blocks:
        if recompute is not None:
            recompute(block)
        if compile:  # the method, and not the hooks around it that gather shards
            block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
    return Parallel(network, _wrapped(network, blocks, layout, device, dtype), layout, device)


def _fewest_rows(blocks: list[nn.Module]) -> int | None:
    """Of a hidden matrix; an adapter's are few, and AdamW needs none on every worker."""
    adapters = {
        id(weight)
        for block in blocks
        for name, weight in block.named_parameters()
        if "lora_" in name
    }
    matrices = [weight for weight in hidden_matrices(*blocks) if id(weight) not in adapters]
    return min((len(matrix) for matrix in matrices), default=None)


def _spread_tokens(network: nn.Module, layout: Layout, device: torch.device) -> None:
    spread = getattr(network, "spread_tokens", None)
    if spread is None:
        raise UserError(
            f"a {type(network).__name__} cannot deal its tokens out: set layout.context to 1"
        )
    shape = (layout.world // layout.context, layout.context)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))["context"]
    spread(Context(mesh.get_group(), mesh.get_local_rank(), layout.context))


def _wrapped(
    network: nn.Module,
    blocks: list[nn.Module],
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    if layout.world == 1:
        return network
    if layout.shard == 1:
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(
            network,
            device_ids=ids,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # of tables that a model computes itself; they never change
        )
    copies = layout.replicate > 1
    shape = (layout.replicate, layout.holders) if copies else (layout.holders,)
    names = ("replicate", "shard") if copies else ("shard",)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Gathered in `dtype` where autocast takes it for layer norms, too. Inputs are left alone:
    # bfloat16 would round times to three digits, and autocast casts the rest.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if device.type == "cuda" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for part in (*blocks, network):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return network
