"""What one forward pass costs, measured without doing it: on the meta device tensors have shapes,
dtypes and storages, but no content.

Counted are the FLOPs of matrix products, convolutions and attention (a multiply-add is 2, pointwise
work nothing), and the bytes that automatic differentiation keeps for the backward pass. Attention
is taken as a fused kernel: it keeps queries, keys, values, its result and a logarithm per row. The
meta device has no autocast, so what that casts on a GPU is cast here.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from ldm_core.planning.weights import REST, blocks_of

Checkpointing = Literal["none", "selective", "full"]
"""What of a block is kept for its backward pass: all of it; its input and the results of matrix
products and attention; its input alone. The rest is computed again."""

Storages = dict[int, int]  # storage -> its bytes; two views of one are kept once


@dataclass(frozen=True)
class ForwardPass:
    """Of one batch.

    Attributes:
        flops: of the whole pass.
        block_flops: of the blocks alone, which checkpointing may compute again.
        kept: bytes held at the end of the pass.
        again: bytes of the block that holds most of what its backward pass computes again.
        widest: bytes of the largest tensor that a block keeps, as large as its gradient.
        attention_bytes: of all queries, keys, values and results of attention over tokens.
    """

    flops: int
    block_flops: int
    kept: Mapping[Checkpointing, int]
    again: Mapping[Checkpointing, int]
    widest: int
    attention_bytes: int

    def of_one(self, batch: int) -> "ForwardPass":
        """A sample's share of a pass over a batch of so many."""
        return ForwardPass(
            self.flops // batch,
            self.block_flops // batch,
            {mode: size // batch for mode, size in self.kept.items()},
            {mode: size // batch for mode, size in self.again.items()},
            self.widest // batch,
            self.attention_bytes // batch,
        )


@dataclass
class _Part:
    flops: int = 0
    saved: Storages = field(default_factory=dict)
    products: Storages = field(default_factory=dict)


def measure_forward(
    network: nn.Module, *inputs: Any, autocast: torch.dtype | None = None
) -> ForwardPass:
    """Count what `network(*inputs)` takes; both are on the meta device, in float32.

    Args:
        network: whose lists of blocks are what checkpointing works on.
        inputs: of its forward method.
        autocast: dtype of matrix products, as on a GPU under `torch.autocast`; None is float32.
            Weights that are cast are not counted: they are kept once, not for each batch.
    """
    watch = _Watch({name: _Part() for name in [REST, *dict(blocks_of(network))]}, network)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch.following(network))
        stack.enter_context(watch)
        stack.enter_context(_Functions(watch, autocast))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(watch.save, lambda kept: kept))
        result = network(*inputs)  # noqa: F841  # what it holds on to is being counted
    return watch.summary()


class _Watch(TorchDispatchMode):
    """Books what happens to the part of the network that is running."""

    def __init__(self, parts: dict[str, _Part], network: nn.Module) -> None:
        super().__init__()
        self.parts, self.running = parts, REST
        self.inputs: Storages = {}
        self.weights = {_storage(weight)[0] for weight in network.parameters()}
        self.attention_bytes = 0
        self.alive: list[Tensor] = []  # a storage that is freed would lend its address to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            self.product(flops, result)
        return result

    def product(self, flops: int, *results: Tensor) -> None:
        """A matrix product, or what consists of them."""
        part = self.parts[self.running]
        part.flops += flops
        self._book(part.products, results)

    def save(self, tensor: Tensor) -> Tensor:
        """What automatic differentiation keeps."""
        self._book(self.parts[self.running].saved, [tensor])
        return tensor

    def _book(self, storages: Storages, tensors: Any) -> None:
        for tensor in tensors:
            key, size = _storage(tensor)
            if key not in self.weights:
                storages[key] = size
                self.alive.append(tensor)

    @contextmanager
    def following(self, network: nn.Module) -> Iterator[None]:
        """Know which block is running, and what it is given."""
        handles = []
        for name, block in blocks_of(network):

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.running = name
                given = (each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor))
                self._book(self.inputs, given)

            def leave(*_: Any) -> None:
                self.running = REST

            handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(block.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def summary(self) -> ForwardPass:
        rest, blocks = self.parts[REST], [p for name, p in self.parts.items() if name != REST]
        everything = _union(rest.saved, *(part.saved for part in blocks))
        entered = _union(rest.saved, self.inputs)
        products = _union(*(part.products for part in blocks))
        again = [_without(part.saved, entered) for part in blocks]
        pointwise = [_without(part.saved, entered | products) for part in blocks]
        return ForwardPass(
            flops=sum(part.flops for part in self.parts.values()),
            block_flops=sum(part.flops for part in blocks),
            kept={
                "none": sum(everything.values()),
                "selective": sum((entered | products).values()),
                "full": sum(entered.values()),
            },
            again={
                "none": 0,
                "selective": max(pointwise, default=0),
                "full": max(again, default=0),
            },
            widest=max((size for part in blocks for size in part.saved.values()), default=0),
            attention_bytes=self.attention_bytes,
        )


# What autocast casts on GPUs, as far as transformers and U-Nets call it.
_LOW = {F.linear, F.conv2d, F.conv3d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul}
_FLOAT32 = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax}


class _Functions(TorchFunctionMode):
    """Casts arguments as autocast does, and puts a stand-in for fused attention in its place."""

    def __init__(self, watch: _Watch, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.watch, self.autocast = watch, autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if self.autocast is not None and func in _LOW:
            return func(*self._cast(args, self.autocast), **self._cast(kwargs, self.autocast))
        if self.autocast is not None and func in _FLOAT32:
            return func(*self._cast(args, torch.float32), **self._cast(kwargs, torch.float32))
        return func(*args, **kwargs)

    def _cast(self, values: Any, dtype: torch.dtype) -> Any:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            result = value.to(dtype)
            if _storage(value)[0] in self.watch.weights and result is not value:
                self.watch.weights.add(_storage(result)[0])
                self.watch.alive.append(result)
            return result

        return tree_map(cast, values)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = self._cast((query, key, value), self.autocast or query.dtype)
        out: Tensor = _Attention.apply(q, k, v)
        self.watch.product(2 * k.shape[-2] * (q.numel() + out.numel()), out)
        self.watch.attention_bytes += sum(part.nbytes for part in (q, k, v, out))
        return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        *batch, heads, tokens, _ = q.shape
        out = q.new_empty(*batch, tokens, heads, v.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


def _union(*many: Storages) -> Storages:
    return {key: size for storages in many for key, size in storages.items()}


def _without(storages: Storages, others: Storages) -> int:
    return sum(size for key, size in storages.items() if key not in others)
