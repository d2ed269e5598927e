"""Reading and changing what passes inside any network, without the network knowing.

For auxiliary heads on a block's output (representation alignment), for edits of it, and for routing
tokens past blocks. Everything is undone when the `with` block ends, whatever happens in it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

Output = Any  # a Tensor, or whatever else the module returns


@contextmanager
def after(network: nn.Module, name: str, change: Callable[[Output], Output]) -> Iterator[None]:
    """Inside the block, the output of the submodule `name` is `change(output)`.

    Raises:
        ValueError: the network has no such submodule.
    """

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Output) -> Output:
        return change(output)

    handle = _submodule(network, name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded(network: nn.Module, *names: str) -> Iterator[dict[str, Output]]:
    """Inside the block, the outputs of these submodules in the latest forward pass, by name.

    They are part of the graph, so a loss on them trains the network.

    Raises:
        ValueError: the network has no such submodule.
    """
    seen: dict[str, Output] = {}

    def keep(name: str, output: Output) -> Output:
        seen[name] = output
        return output

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(after(network, name, partial(keep, name)))
        yield seen


@contextmanager
def routed(network: nn.Module, first: str, last: str, kept: Tensor) -> Iterator[None]:
    """Inside the block, only the tokens `kept` pass the submodules from `first` to `last`; the
    others take up again after `last` as they were before `first` (TREAD, Krause et al. 2025).

    For blocks that take (B, N, D) tokens first, return them, and know no positions.

    Args:
        network: whose submodules these are.
        first, last: names of the first and the last block that sees fewer tokens.
        kept: (B, M) long, tokens of each sample, none twice.

    Raises:
        ValueError: the network has no such submodule.
    """
    whole: list[Tensor] = []

    def drop(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        x = arguments[0] if arguments else named["hidden_states"]
        whole.append(x)
        x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        return ((x, *arguments[1:]), named) if arguments else ((), {**named, "hidden_states": x})

    def restore(output: Tensor) -> Tensor:
        x = whole.pop()
        return x.scatter(1, kept[..., None].expand(-1, -1, x.shape[-1]), output)

    handle = _submodule(network, first).register_forward_pre_hook(drop, with_kwargs=True)
    try:
        with after(network, last, restore):
            yield
    finally:
        handle.remove()


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(list(dict(network.named_modules()))[1:9])
        raise ValueError(f"the network has no submodule {name!r}; it has {names}, …") from error
