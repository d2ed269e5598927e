"""The weights of a network, part by part: the blocks that parallel training gathers, and the rest.

A network on the meta device will do; nothing is computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ldm_core.training.optimizers import hidden_matrices

REST = ""


@dataclass(frozen=True)
class Weights:
    """How many there are, and where.

    Attributes:
        parts: parameters of each block by its name, and of the rest under "".
        matrices: shapes of the hidden matrices, which are Muon's.
    """

    parts: dict[str, int]
    matrices: tuple[tuple[int, int], ...]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def hidden(self) -> int:
        """Those of the hidden matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def rest(self) -> int:
        """Those outside the blocks."""
        return self.parts[REST]

    @property
    def largest_block(self) -> int:
        """Those of the largest block."""
        return max((count for name, count in self.parts.items() if name != REST), default=0)

    @property
    def fewest_rows(self) -> int:
        """Of a hidden matrix: more shards than that would leave some without a row."""
        return min(rows for rows, _ in self.matrices)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Name of each list of blocks -> (how many blocks, their parameters together)."""
        kinds: dict[str, tuple[int, int]] = {}
        for name, count in self.parts.items():
            kind = name.rpartition(".")[0]
            blocks, total = kinds.get(kind, (0, 0))
            kinds[kind] = (blocks + 1, total + count)
        return kinds


def weights_of(network: nn.Module) -> Weights:
    """Count a network's parameters; one that two parts share counts once."""
    parts: dict[str, int] = {}
    counted: set[int] = set()
    units = dict(blocks_of(network))
    for name, part in [*units.items(), (REST, network)]:
        own = {id(weight): weight.numel() for weight in part.parameters()}
        parts[name] = sum(count for key, count in own.items() if key not in counted)
        counted |= own.keys()
    matrices = [weight.shape for unit in units.values() for weight in hidden_matrices(unit)]
    return Weights(parts, tuple((rows, columns) for rows, columns in matrices))


def blocks_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network by name: all members of its lists, but not those inside of others."""
    for name, child in network.named_children():
        inside = child.named_children() if isinstance(child, nn.ModuleList) else blocks_of(child)
        for number, block in inside:
            yield f"{name}.{number}", block


def muon_flops(matrices: tuple[tuple[int, int], ...], iterations: int = 5) -> int:
    """FLOPs of orthogonalising every matrix once; a multiply-add counts 2.

    An iteration of Newton-Schulz is a Gram matrix of the shorter side, its square, and a product.
    """

    def once(rows: int, columns: int) -> int:
        short, long = sorted((rows, columns))
        return 2 * short * short * (2 * long + short)

    return iterations * sum(once(*shape) for shape in matrices)
