"""Tensors out of a checkpoint, into whatever layout they are wanted in.

Torch's planner says which boxes of the stored pieces each worker needs; it reads their bytes and no
others but small gaps between them. Workers need not speak to each other; `checkpoint_copies` has
them share what they hold copies of.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from ldm_core.files import filesystem, join
from ldm_core.training.checkpoint_folder import Checkpoint
from ldm_core.training.checkpoint_patience import patiently

_GAP = 1 << 20  # bytes that are read and not needed rather than asked for anew
_REQUEST = 64 << 20
_THREADS = 8


@dataclass(frozen=True)
class _Read:
    """A box of a piece: the bytes of its rows in a file, and what to cut out of them."""

    item: ReadItem
    file: str
    begin: int
    end: int
    rows: tuple[int, ...]
    dtype: torch.dtype


def load_tensors(checkpoint: Checkpoint, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors by name, in place; distributed ones with what this worker holds of them."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(targets), _metadata(checkpoint.index), is_coordinator=True)
    plan = planner.finish_plan(planner.create_local_plan())
    reads = [_read(checkpoint.index, item) for item in plan.items if math.prod(item.lengths)]
    requests = list(_requests(reads))

    def fetch(request: list[_Read]) -> None:
        first, end = request[0].begin, max(read.end for read in request)
        data = memoryview(_bytes(join(checkpoint.uri, request[0].file), first, end))
        for read in request:
            target = planner.resolve_tensor(read.item).detach()
            source = _box(data[read.begin - first : read.end - first], read)
            target.copy_(source)
            planner.commit_tensor(read.item, target)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint-read") as pool:
        list(pool.map(fetch, requests))


def read_tensors(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """Whole tensors whose names begin with `prefix`, without it, in host memory."""
    targets = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in checkpoint.index.items()
        if name.startswith(prefix)
    }
    load_tensors(checkpoint, targets)
    return {name.removeprefix(prefix): value for name, value in targets.items()}


def _metadata(index: Mapping[str, Any]) -> Metadata:
    """The index in the planner's words."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, entry["dtype"])),
                torch.Size(entry["shape"]),
                [
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
                    for offsets, shape, _, _ in entry["pieces"]
                ],
            )
            for name, entry in index.items()
        }
    )


def _read(index: Mapping[str, Any], item: ReadItem) -> _Read:
    entry = index[item.storage_index.fqn]
    wanted = list(item.storage_index.offset or ())
    shape, file, begin = next(rest for offsets, *rest in entry["pieces"] if offsets == wanted)
    dtype = getattr(torch, entry["dtype"])
    row = math.prod(shape[1:]) * dtype.itemsize
    first, rows = (item.storage_offsets[0], item.lengths[0]) if shape else (0, 1)
    begin += first * row
    return _Read(item, file, begin, begin + rows * row, (rows, *shape[1:]) if shape else (), dtype)


def _box(data: memoryview, read: _Read) -> Tensor:
    """The box out of the bytes of its rows."""
    whole = torch.frombuffer(data, dtype=read.dtype).view(read.rows)
    offsets, lengths = read.item.storage_offsets[1:], read.item.lengths[1:]
    for dim, (first, length) in enumerate(zip(offsets, lengths, strict=True), start=1):
        whole = whole.narrow(dim, first, length)
    return whole


def _requests(reads: list[_Read]) -> Iterator[list[_Read]]:
    """Reads that are near each other in a file, together."""
    near: list[_Read] = []
    for read in sorted(reads, key=lambda read: (read.file, read.begin)):
        if near and not (
            read.file == near[0].file
            and read.begin - near[-1].end < _GAP
            and read.end - near[0].begin < _REQUEST
        ):
            yield near
            near = []
        near.append(read)
    if near:
        yield near


def _bytes(uri: str, begin: int, end: int) -> bytearray:
    fs, path = filesystem(uri)
    return bytearray(patiently(lambda: fs.cat_file(path, start=begin, end=end)))
