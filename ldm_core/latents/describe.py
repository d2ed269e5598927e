"""The manifest of what the store's tables hold at this moment.

The tables go by piece by piece: memory is that of a piece, however many rows there are.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ldm_core.latents.manifest import EncoderEntry, LatentStatistics, Manifest, RoundingError
from ldm_core.latents.rounding import RoundingErrors
from ldm_core.latents.schema import TABLES, content_digest, decode_array
from ldm_core.latents.statistics import ChannelMoments, Posterior
from ldm_core.latents.store import LatentStore

_LATENTS, _SMALL = 64, 16384  # rows of a piece, with latents in it or without


def describe(
    store: LatentStore,
    autoencoder: EncoderEntry,
    texts: tuple[EncoderEntry, ...],
    max_tokens: int,
    downsampling: int,
    statistics: LatentStatistics | None,
    encoding: Mapping[str, bool | int | str] | None = None,
) -> Manifest:
    """Pin the tables and count them, ready for `LatentStore.publish`.

    Args:
        store: with at least one sample.
        autoencoder: what made the latents.
        texts: what embedded the captions.
        max_tokens: at which captions were cut.
        downsampling: of the autoencoder.
        statistics: the autoencoder's own; None measures them over the stored rows.
        encoding: see `Manifest`.
    """
    versions = {name: store.open(name).version() for name in TABLES}
    samples = _Samples(store, versions["samples"])
    encoder_digests = (autoencoder.digest, *(entry.digest for entry in texts))
    content = content_digest(samples.digests(), encoder_digests)  # which counts them as well
    rejects = _reasons(store, versions["rejects"])
    return Manifest(
        tables=versions,
        counts={
            "samples": samples.buckets.total(),
            "texts": store.dataset("texts", versions["texts"]).count_rows(),
            "rejects": rejects.total(),
        },
        autoencoder=autoencoder,
        texts=texts,
        max_tokens=max_tokens,
        channels=samples.channels,
        downsampling=downsampling,
        statistics=statistics or _measured(store, versions["samples"]),
        buckets=dict(sorted(samples.buckets.items())),
        rejects=dict(sorted(rejects.items())),
        bytes=sum(store.bytes(name, version) for name, version in versions.items()),
        content=content,
        rounding=_rounding(store, versions["texts"]),
        encoding=dict(encoding or {}),
    )


class _Samples:
    """What the small columns of `samples` tell.

    Attributes:
        buckets: number of samples of each, once `digests` has gone by.
        channels: of the latents.
    """

    def __init__(self, store: LatentStore, version: int) -> None:
        self.buckets: Counter[str] = Counter()
        self.channels = 0
        self._store, self._version = store, version

    def digests(self) -> Iterator[str]:
        """Of each sample, in no particular order."""
        columns = ["digest", "bucket", "latent_shape"]
        for rows in _pieces(self._store, "samples", self._version, columns, _SMALL):
            self.buckets.update(row["bucket"] for row in rows)
            self.channels = rows[0]["latent_shape"][0]
            yield from (row["digest"] for row in rows)


def _reasons(store: LatentStore, version: int) -> Counter[str]:
    pieces = _pieces(store, "rejects", version, ["reason"], _SMALL)
    return Counter(row["reason"] for rows in pieces for row in rows)


def _measured(store: LatentStore, version: int) -> LatentStatistics:
    moments = ChannelMoments()
    columns = ["latent_mean", "latent_logvar", "latent_shape"]
    for rows in _pieces(store, "samples", version, columns, _LATENTS):
        moments.add(_posterior(row) for row in rows)
    result = moments.result()
    assert result, "described without a sample"
    return result


def _posterior(row: dict[str, Any]) -> Posterior:
    """Of one sample, (1, C, h, w) each."""
    shape = row["latent_shape"]
    return decode_array(row["latent_mean"], shape)[None], decode_array(row["latent_logvar"], shape)[
        None
    ]


def _rounding(store: LatentStore, version: int) -> dict[str, RoundingError]:
    errors = RoundingErrors()
    for rows in _pieces(store, "texts", version, ["encoder", "relative_error"], _SMALL):
        for encoder in {row["encoder"] for row in rows}:
            errors.add(encoder, (r["relative_error"] for r in rows if r["encoder"] == encoder))
    return errors.result()


def _pieces(
    store: LatentStore, table: str, version: int, columns: Sequence[str], rows: int
) -> Iterator[list[dict[str, Any]]]:
    """Some columns of a table, file by file: of a whole dataset pyarrow reads ahead as it likes."""
    for file in store.dataset(table, version).get_fragments():
        batches = file.to_batches(
            TABLES[table], columns=list(columns), batch_size=rows, batch_readahead=1
        )
        yield from (batch.to_pylist() for batch in batches if batch.num_rows)
