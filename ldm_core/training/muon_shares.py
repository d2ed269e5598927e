"""Who orthogonalises which matrix: the work of Muon dealt out over workers.

Each matrix is whole on one worker while it is orthogonalised. None is done twice, but for the
copies of a network that is both replicated and sharded.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ldm_core.training.shards import shard_rows

Orthogonalise = Callable[[Tensor], Tensor]
"""Of a batch of matrices (K, rows, columns)."""

TOGETHER = 1 << 22  # numbers: of small matrices, what is around a product costs more than itself


def deal(sizes: list[int], world: int) -> list[int]:
    """The worker of each matrix: dealt out from the largest to the smallest."""
    largest_first = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)
    owners = [0] * len(sizes)
    for place, i in enumerate(largest_first):
        owners[i] = place % world
    return owners


def batches(shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
    """Matrices of one shape, as many as make a batch, by their places; large ones one by one."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, shape in enumerate(shapes):
        alike.setdefault(tuple(shape), []).append(place)
    for shape, places in alike.items():
        most = max(1, TOGETHER // math.prod(shape))
        yield from (places[first : first + most] for first in range(0, len(places), most))


def of_whole(
    matrices: list[Tensor], orthogonalise: Orthogonalise, rank: int, world: int
) -> list[Tensor]:
    """Orthogonalise matrices that every worker of the default group holds alike."""
    flat = torch.zeros(sum(m.numel() for m in matrices), device=matrices[0].device)
    pieces = flat.split([m.numel() for m in matrices])
    updates = [piece.view(m.shape) for piece, m in zip(pieces, matrices, strict=True)]
    owners = deal([m.numel() for m in matrices], world)
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    for places in batches([matrices[i].shape for i in mine]):
        some = [mine[place] for place in places]
        for i, done in zip(some, orthogonalise(_stacked([matrices[i] for i in some])), strict=True):
            updates[i].copy_(done)
    if world > 1:
        dist.all_reduce(flat)  # a sum with zeros: each had its own share
    return updates


def of_shards(
    shards: list[Tensor], rows: list[int], orthogonalise: Orthogonalise, group: ProcessGroup
) -> list[Tensor]:
    """Orthogonalise matrices of which each worker of `group` holds consecutive rows.

    One exchange brings every matrix's rows to its owner, another brings them back. A worker sends
    and receives about as much as it holds.

    Args:
        shards: (rows held, columns) each.
        rows: of the whole matrices.
        orthogonalise: what is done to whole matrices of a shape.
        group: whose r-th worker holds the r-th of the pieces that `torch.chunk` makes.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    columns = [shard.shape[1] for shard in shards]
    heights = [shard_rows(count, world) for count in rows]
    owners = deal([r * c for r, c in zip(rows, columns, strict=True)], world)
    theirs = [[i for i, owner in enumerate(owners) if owner == r] for r in range(world)]
    mine, by_owner = theirs[rank], [i for owned in theirs for i in owned]

    def sizes(matrices: list[int], holder: int) -> list[int]:
        return [heights[i][holder] * columns[i] for i in matrices]

    sent = [sum(sizes(owned, rank)) for owned in theirs]
    received = [sum(sizes(mine, holder)) for holder in range(world)]
    flat = torch.cat([shards[i].flatten() for i in by_owner])
    pieces = [
        part.split(sizes(mine, holder))
        for holder, part in enumerate(_exchange(flat, sent, received, group).split(received))
    ]
    for places in batches([(rows[i], columns[i]) for i in mine]):
        whole = [torch.cat([held[place] for held in pieces]) for place in places]
        height, width = rows[mine[places[0]]], columns[mine[places[0]]]
        updates = orthogonalise(_stacked([flat.view(height, width) for flat in whole]))
        for place, done in zip(places, updates, strict=True):
            for holder, part in enumerate(done.split(heights[mine[place]])):
                pieces[holder][place].copy_(part.flatten())
    ready = [piece for held in pieces for piece in held]  # none where workers outnumber matrices
    flat = _exchange(torch.cat([flat.new_empty(0), *ready]), received, sent, group)
    back = dict(zip(by_owner, flat.split(sizes(by_owner, rank)), strict=True))
    return [back[i].view(-1, columns[i]) for i in range(len(shards))]


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """(K, rows, columns); a large matrix, which is alone, is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def _exchange(flat: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    got = flat.new_empty(sum(received))
    dist.all_to_all_single(got, flat, received, sent, group=group)
    return got
