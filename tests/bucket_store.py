"""Latent stores of several buckets and row groups, written without Ray or encoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from small_store import AUTOENCODER, CLIP, T5, sample_row, text_rows
from written_stores import laid_down

from ldm_core.latents.describe import describe
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.schema import SAMPLES, TEXTS
from ldm_core.latents.store import LatentStore, StoreVersion

STATISTICS = LatentStatistics(mean=(0.25, -0.5), std=(2.0, 0.5))
SQUARE, WIDE, CLIP_OF_5 = "4x4x1", "2x6x1", "4x4x5"
SHAPES: dict[str, tuple[int, ...]] = {
    SQUARE: (2, 4, 4),
    WIDE: (2, 2, 6),
    CLIP_OF_5: (2, 2, 4, 4),
    "8x8x1": (4, 8, 8),
    "32x32x1": (4, 32, 32),
}


def bucket_store(
    uri: str | Path,
    counts: Mapping[str, int],
    group: int = 8,
    prefix: str = "",
    logvar: float = -1.0,
    captions: Sequence[str] = ("a dog", "a red cat", "cat"),
    statistics: LatentStatistics | None = STATISTICS,
    texts_of: int = 1000,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> StoreVersion:
    """Publish random latents.

    Args:
        uri: of the store.
        counts: samples of each bucket.
        group: rows of a file, which is one row group.
        prefix: of the ids, which are 4x4x1-0000 and so on.
        logvar: of all of them.
        captions: sample i has the i-th and the next, of equal weights.
        statistics: None measures them.
        texts_of: rows of a file of texts.
        shapes: of each bucket's latents.
    """
    buckets = tuple((bucket, count, shapes[bucket]) for bucket, count in counts.items())
    options = (group, prefix, logvar, tuple(captions), statistics, texts_of)
    return laid_down(uri, _write, buckets, *options)


def _write(
    uri: str | Path,
    buckets: Sequence[tuple[str, int, tuple[int, ...]]],
    group: int,
    prefix: str,
    logvar: float,
    captions: Sequence[str],
    statistics: LatentStatistics | None,
    texts_of: int,
) -> None:
    store = LatentStore(str(uri))
    store.create()
    noise = np.random.default_rng(0)
    for bucket, count, shape in buckets:
        rows = [
            _row(f"{prefix}{bucket}-{k:04d}", bucket, shape, noise, logvar, captions, k)
            for k in range(count)
        ]
        add_files(store, "samples", rows, group, bucket)
    told = [row for text in sorted({*captions, ""}) for row in text_rows(text)]
    add_files(store, "texts", told, texts_of, "texts")
    publish(store, statistics)


def add(store: LatentStore, table: str, rows: list[dict[str, object]], shard: str) -> None:
    add_files(store, table, rows, len(rows), shard)


def add_files(
    store: LatentStore, table: str, rows: list[dict[str, object]], each: int, shard: str
) -> None:
    """Files of so many rows each, in one commit."""
    data = pa.Table.from_pylist(rows, schema={"samples": SAMPLES, "texts": TEXTS}[table])
    parts = [
        store.write_part(table, data.slice(start, each), f"{shard}-{start}")
        for start in range(0, len(rows), each)
    ]
    store.commit(table, parts, shard)


def publish(store: LatentStore, statistics: LatentStatistics | None = STATISTICS) -> StoreVersion:
    store.publish(describe(store, AUTOENCODER, (T5, CLIP), 128, 1, statistics))
    return store.open_version()


def _row(
    id: str,
    bucket: str,
    shape: tuple[int, ...],
    noise: np.random.Generator,
    logvar: float,
    captions: Sequence[str],
    k: int,
) -> dict[str, object]:
    mean = torch.from_numpy(noise.normal(size=shape)).float()
    told = [captions[(k + j) % len(captions)] for j in range(min(2, len(captions)))]
    row = sample_row(id, mean, torch.full(shape, logvar), tuple(told))
    return row | {"bucket": bucket}
