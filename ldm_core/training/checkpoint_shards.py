"""What each worker writes of tensors that are spread over workers in whatever layout.

Torch's planner for distributed checkpoints says which worker holds which piece and who writes what
several hold. The pieces go into safetensors files, which unlike its own format hold no pickle.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ldm_core.training.checkpoint_ranks import Ranks

PART_BYTES = 256 << 20  # of a file, unless one tensor is larger: a few copies are in memory at once


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, in this worker's memory: where it begins, and the whole tensor's shape."""

    name: str
    offsets: tuple[int, ...]
    whole: tuple[int, ...]
    data: Tensor

    @property
    def key(self) -> str:
        """Its name in a file; a whole tensor's is its own."""
        if tuple(self.data.shape) == self.whole:
            return self.name
        return f"{self.name}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class Part:
    """A file as it is to be written, and its entries of the index."""

    name: str
    data: bytes
    entries: list[dict[str, Any]]


class Staging:
    """Copies this worker's pieces to host memory, which it keeps and uses again the next time.

    The plan is kept as well, for as long as no worker's tensors change in name, shape or layout.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._known: object = None
        self._items: list[WriteItem] = []
        self._host: dict[str, Tensor] = {}

    def known(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether the last plan is still this worker's."""
        return self._known == _signature(tensors)

    def copy(self, tensors: Mapping[str, Tensor], plan_anew: bool) -> list[Piece]:
        """This worker's pieces, which later changes of the tensors do not touch.

        Args:
            tensors: by name; on every worker the same names, as plain tensors of which all hold
                the same or as distributed ones.
            plan_anew: the same on every worker.
        """
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), is_coordinator=self.ranks.rank == 0)
        if plan_anew:
            self._items, self._host = list(self._plan(planner).items), {}
            self._known = _signature(tensors)
        pieces = []
        for item in self._items:
            source = planner.resolve_data(item)
            assert isinstance(source, Tensor), f"{item.index.fqn} is no tensor"
            assert item.tensor_data is not None
            host = self._to_host(str(item.index), source.detach())
            offsets, whole = item.tensor_data.chunk.offsets, item.tensor_data.size
            pieces.append(Piece(item.index.fqn, tuple(offsets), tuple(whole), host))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies are under way
        return pieces

    def _plan(self, planner: DefaultSavePlanner) -> SavePlan:
        """Who writes what: decided on the first worker."""
        local = self.ranks.exchange(planner.create_local_plan())
        plans = self.ranks.first(lambda: planner.create_global_plan(local)[0])
        return planner.finish_plan(plans[self.ranks.rank])

    def _to_host(self, key: str, source: Tensor) -> Tensor:
        if key not in self._host:
            pinned = source.device.type == "cuda"
            self._host[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
        return self._host[key].copy_(source, non_blocking=True)


def _signature(tensors: Mapping[str, Tensor]) -> object:
    """What a plan depends on; the mesh and placements of a distributed tensor among it."""
    return [
        (name, t.shape, t.dtype, getattr(t, "device_mesh", None), getattr(t, "placements", None))
        for name, t in tensors.items()
    ]


def parts(pieces: list[Piece], rank: int) -> Iterator[Part]:
    """The files of a worker, one after the other."""
    for number, group in enumerate(_groups(pieces)):
        data = safetensors.torch.save({piece.key: piece.data for piece in group})
        name = f"part-{rank:05d}-{number:03d}.safetensors"
        places = _places(data)
        entries = [
            {
                "name": piece.name,
                "dtype": str(piece.data.dtype).removeprefix("torch."),
                "whole": piece.whole,
                "piece": [piece.offsets, tuple(piece.data.shape), name, places[piece.key]],
            }
            for piece in group
        ]
        yield Part(name, data, entries)


def _groups(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """The pieces in order, cut where a file would grow too large."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.data.nbytes > PART_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.data.nbytes
    if group:
        yield group


def _places(data: bytes) -> dict[str, int]:
    """The first byte of every tensor in a safetensors file."""
    header = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + header])
    return {
        name: 8 + header + entry["data_offsets"][0]
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def merged_index(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """All workers' entries, by tensor."""
    index: dict[str, Any] = {}
    for entry in entries:
        tensor = index.setdefault(
            entry["name"], {"dtype": entry["dtype"], "shape": entry["whole"], "pieces": []}
        )
        tensor["pieces"].append(entry["piece"])
    return index
