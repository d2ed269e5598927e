"""What becomes of a shard's rows: Parquet files of the store, and a small row that lists them."""

import json
from dataclasses import asdict

import pyarrow as pa

from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore, PartFile
from pipelines.encode_media import Row
from pipelines.encode_plan import Item
from pipelines.encode_throughput import WRITE, Throughput


def reject_row(item: Item) -> Row:
    """A row of `rejects` from an item with stage, reason and detail."""
    names = ("id", "part", "parts", "stage", "reason", "detail", "fingerprint")
    about = {"source_id": item["source"], "source_uri": item["uri"]}
    return {**about, **{name: item[name] for name in names}}


def written(
    store: LatentStore,
    shard: str,
    throughput: Throughput,
    kind: str = WRITE,
    **tables: list[Row],
) -> Row:
    """Write a file for every table that has rows of this shard; the result for the driver, which is
    small, whatever the shard's size. What the driver itself writes is of another kind."""
    parts = []
    for name, rows in tables.items():
        if rows:
            table = table_of(name, rows, shard)
            with throughput.timed(kind, len(rows), table.nbytes):
                parts.append(store.write_part(name, table, shard))
    told = json.dumps([asdict(part) for part in parts])
    return {"shard": shard, "parts": told, "work": throughput.tell()}


def table_of(name: str, rows: list[Row], shard: str) -> pa.Table:
    """Rows as a table of the store."""
    return pa.Table.from_pylist([{**row, "shard": shard} for row in rows], schema=TABLES[name])


def parts_of(result: Row) -> list[PartFile]:
    """The files a result row lists."""
    return [PartFile(**part) for part in json.loads(result["parts"])]
