"""The manifest of what the store's tables hold at this moment."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ldm_core.latents.manifest import EncoderEntry, LatentStatistics, Manifest
from ldm_core.latents.schema import TABLES, content_digest, decode_array
from ldm_core.latents.statistics import channel_statistics
from ldm_core.latents.store import LatentStore


def describe(
    store: LatentStore,
    autoencoder: EncoderEntry,
    texts: tuple[EncoderEntry, ...],
    max_tokens: int,
    downsampling: int,
    statistics: LatentStatistics | None,
) -> Manifest:
    """Pin the tables and count them, ready for `LatentStore.publish`.

    Args:
        store: with at least one sample.
        autoencoder: what made the latents.
        texts: what embedded the captions.
        max_tokens: at which captions were cut.
        downsampling: of the autoencoder.
        statistics: the autoencoder's own; None measures them over the stored rows.
    """
    versions = {name: store.open(name).version() for name in TABLES}
    samples = store.table("samples", versions["samples"], ["digest", "bucket", "latent_shape"])
    rejects = store.table("rejects", versions["rejects"], ["reason"])
    encoder_digests = (autoencoder.digest, *(entry.digest for entry in texts))
    return Manifest(
        tables=versions,
        counts={
            "samples": samples.num_rows,
            "texts": store.dataset("texts", versions["texts"]).count_rows(),
            "rejects": rejects.num_rows,
        },
        autoencoder=autoencoder,
        texts=texts,
        max_tokens=max_tokens,
        channels=samples["latent_shape"][0].as_py()[0],
        downsampling=downsampling,
        statistics=statistics or channel_statistics(_posteriors(store, versions["samples"])),
        buckets=_count(samples["bucket"]),
        rejects=_count(rejects["reason"]),
        bytes=sum(store.bytes(name, version) for name, version in versions.items()),
        content=content_digest(samples["digest"].to_pylist(), encoder_digests),
    )


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(sorted(Counter(column.to_pylist()).items()))


def _posteriors(store: LatentStore, version: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(mean, logvar) of each stored sample, (1, C, h, w), in no particular order."""
    columns = ["latent_mean", "latent_logvar", "latent_shape"]
    for batch in store.dataset("samples", version).to_batches(columns=columns):
        for row in batch.to_pylist():
            mean, logvar = (decode_array(row[name], row["latent_shape"]) for name in columns[:2])
            yield mean[None], logvar[None]
