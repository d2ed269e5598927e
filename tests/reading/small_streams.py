"""Readers of a small store of three buckets, and what they read."""

import torch
from bucket_store import CLIP_OF_5, SQUARE, WIDE

from ldm_core.latents.reader import LatentBatch, sample_key
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.media.buckets import Bucket
from ldm_core.reading.index import index_store
from ldm_core.reading.stream import StreamReader

COUNTS = {SQUARE: 61, WIDE: 29, CLIP_OF_5: 7}
TOTAL = sum(COUNTS.values())


def tokens(bucket: str) -> int:
    """Patches of 1 x 1 x 1 of the latents in `bucket_store`, whose clips are halved in time."""
    size = Bucket.parse(bucket)
    return size.height * size.width * (2 if size.frames > 1 else 1)


def reader_of(*versions: StoreVersion, **options) -> StreamReader:
    settings = {"seed": 0, "lanes": 4, "budget": 64, "tokens": tokens, "window_bytes": 5000}
    indexes = [index_store(version) for version in versions]
    return StreamReader(indexes, **(settings | options))


def flat(nested: list[list[str]]) -> list[str]:
    return [id for ids in nested for id in ids]


def epoch_ids(reader: StreamReader, epoch: int) -> list[str]:
    """As they are read."""
    names = {sample_key(id): id for version in reader.indexes for id in ids_of(version.uri)}
    return [
        names[key]
        for step in reader.order.steps(epoch)
        for batch in reader.batches(step, epoch=epoch)
        for key in batch.ids.tolist()
    ]


def ids_of(uri: str) -> list[str]:
    return LatentStore(uri).open_version().table("samples", ["id"])["id"].to_pylist()


def same(one: LatentBatch, other: LatentBatch) -> bool:
    tensors = [
        (b.latents, b.ids, b.condition.tokens, b.condition.mask, b.condition.pooled)
        for b in (one, other)
    ]
    told = [(b.captions, b.bucket, b.epoch) for b in (one, other)]
    return told[0] == told[1] and all(map(torch.equal, *tensors))
