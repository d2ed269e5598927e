"""The data-set card: the README.md of a latent store."""

from ldm_core.files import join, read_bytes, write_bytes
from ldm_core.latents.manifest import EncoderEntry, Manifest, RoundingError
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore

_CARD = """---
tags: [latents, delta-lake, parquet]
---
# Latent store

Latents and caption embeddings of {samples} captioned pictures or videos, made by `ldm encode` of
latent-diffusion-on-ray. This card describes version {number} of {created}; its content is
`{content}`. Pixels are not in here: `source_uri` says where each came from, and the sources'
licences hold for the latents too.

- {samples} samples, {captions} distinct captions with the empty one, {rejects} rejects
- {bytes:,} bytes
- latents: {channels} channels, {downsampling} pixels of a side for one of theirs; mean and
  log-variance of the posterior, not normalised
- channel mean {mean}, standard deviation {std}
- captions cut at {max_tokens} tokens
{rounding}{encoding}
| bucket (height x width x frames) | samples |
|---|---|
{buckets}

| encoder | digest | where it was |
|---|---|---|
{encoders}

| rejected because | files |
|---|---|
{reasons}

## Reading it

`samples/`, `texts/` and `rejects/` are Delta tables of Parquet files, and `versions/*.json` name
the Delta versions that belong together: {tables[samples]}, {tables[texts]} and {tables[rejects]} of
these. Read them as Delta tables, and at these versions: the bare files also hold rows that were
superseded. Change `"."` to the store's place, also `s3://…`.

```python
import numpy as np
from deltalake import DeltaTable

store = "."
samples = DeltaTable(f"{{store}}/samples", version={tables[samples]})

table = samples.to_pyarrow_table(columns=["id", "captions", "latent_mean", "latent_shape"])
frame = samples.to_pandas(columns=["id", "bucket", "source_uri"])

first = table.slice(0, 1).to_pylist()[0]
latent = np.frombuffer(first["latent_mean"], "<f2").reshape(first["latent_shape"])
```

Polars:

```python
import polars

store = "."
texts = polars.scan_delta(f"{{store}}/texts", version={tables[texts]})
longest = texts.select("encoder", "caption").sort(polars.col("caption").str.len_chars()).collect()
```

DuckDB, with the files that a version consists of (its `delta` extension, once installed, has
`delta_scan('./samples')` for the tables' present state):

```python
import duckdb
from deltalake import DeltaTable

store = "."
files = DeltaTable(f"{{store}}/samples", version={tables[samples]}).file_uris()
query = "SELECT bucket, count(*) AS samples FROM read_parquet(?) GROUP BY bucket"
buckets = duckdb.execute(query, [files]).fetchall()
```

Training reads it with `ldm train`; `ldm store` lists its versions and checks them.

## Columns

{columns}
"""


def store_card(manifest: Manifest) -> str:
    """The card of a published version, in Markdown."""
    statistics = manifest.statistics
    return _CARD.format(
        samples=manifest.counts["samples"],
        rejects=manifest.counts["rejects"],
        captions=manifest.counts["texts"] // max(len(manifest.texts), 1),
        number=manifest.number,
        tables=manifest.tables,
        created=manifest.created[:10],
        content=manifest.content,
        bytes=manifest.bytes,
        channels=manifest.channels,
        downsampling=manifest.downsampling,
        mean=_numbers(statistics.mean),
        std=_numbers(statistics.std),
        max_tokens=manifest.max_tokens,
        rounding="".join(map(_rounding, manifest.rounding.items())),
        encoding="".join(f"- encoded with {k}: {v}\n" for k, v in manifest.encoding.items()),
        buckets=_rows(manifest.buckets),
        encoders="\n".join(map(_encoder, (manifest.autoencoder, *manifest.texts))),
        reasons=_rows(manifest.rejects),
        columns="\n\n".join(map(_columns, TABLES)),
    )


def write_card(store: LatentStore, manifest: Manifest) -> None:
    """Write the card of a published version as the store's `README.md`."""
    write_bytes(join(store.uri, "README.md"), store_card(manifest).encode())


def keep_card(store: LatentStore, manifest: Manifest) -> None:
    """Write the card unless it is there: a kill may have come between publishing and writing it."""
    told = f"This card describes version {manifest.number} of".encode()
    try:
        there = told in read_bytes(join(store.uri, "README.md"))
    except FileNotFoundError:
        there = False
    if not there:
        write_card(store, manifest)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _rows(counts: dict[str, int]) -> str:
    return "\n".join(f"| {name} | {count} |" for name, count in counts.items()) or "| none | 0 |"


def _rounding(named: tuple[str, RoundingError]) -> str:
    name, error = named
    return (
        f"- {name} embeddings are in 8 bits, off by {100 * error.mean:.2f} % of their norm on "
        f"average, by {100 * error.largest:.2f} % at most, as measured over {error.captions} "
        "captions\n"
    )


def _encoder(entry: EncoderEntry) -> str:
    return f"| {entry.name} | `{entry.digest}` | `{entry.uri}` |"


def _columns(table: str) -> str:
    columns = ", ".join(f"`{field.name}` {field.type}" for field in TABLES[table])
    return f"`{table}`: {columns}"
