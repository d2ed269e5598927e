"""A latent store of the identity autoencoder that holds, and ways to make it not hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import small_store as small
from written_stores import laid_down

from ldm_core.autoencoders.autoencoder import AutoencoderFacts, autoencoder_facts
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.schema import TABLES
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.tally import Check
from ldm_core.latents.verify import verify

IDENTITY = EncoderEntry(name="autoencoder", uri="identity", digest="identity")
FACTS: AutoencoderFacts = autoencoder_facts("identity")

Rows = list[dict[str, Any]]


def sound_store(
    uri: str | Path, count: int = 12, autoencoder: EncoderEntry = IDENTITY, **options: Any
) -> StoreVersion:
    """A small store, by default in pixel space, with two rejects."""
    return laid_down(uri, _write, count, autoencoder, *options.items())


def _write(uri: str, count: int, autoencoder: EncoderEntry, *options: tuple[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "AUTOENCODER", autoencoder)
        store = small.small_store(uri, count, **{"shape": (3, 4, 4), **dict(options)}).store
        add_rows(store, "rejects", [reject("a.txt"), reject("b.txt")], "rejects")
        store.publish(small.describe(store, autoencoder, (small.T5, small.CLIP), 128, 1, None))


def reject(id: str) -> dict[str, Any]:
    row = dict.fromkeys(TABLES["rejects"].names)
    named = {"id": id, "source_id": id, "part": 0, "parts": 1}
    return row | named | {"stage": "decode", "reason": "not an image", "detail": ""}


def add_sample(store: LatentStore, id: str, caption: str = "a dog") -> StoreVersion:
    """Publish a version with one more sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "AUTOENCODER", IDENTITY)
        known = store.table("texts", columns=["caption"])["caption"].to_pylist()
        if caption in known:
            patch.setattr(small, "text_rows", lambda _: [])
        return small.add_sample(store, id, caption)


def add_rows(store: LatentStore, table: str, rows: Rows, shard: str) -> None:
    part = store.write_part(table, pa.Table.from_pylist(rows, schema=TABLES[table]), shard)
    store.commit(table, [part], shard)


def change_rows(
    version: StoreVersion, table: str, change: Callable[[Rows], object]
) -> StoreVersion:
    """A version with other rows under the same manifest: what `change` makes of the sorted ones."""
    store = version.store
    rows = version.table(table).to_pylist()
    rows.sort(key=lambda row: str(row.get("id") or (row["caption"], row["encoder"])))
    change(rows)
    store.open(table).delete()
    add_rows(store, table, rows, f"changed{len(store.versions())}")
    tables = version.manifest.tables | {table: store.open(table).version()}
    size = sum(store.bytes(name, number) for name, number in tables.items())
    return change_manifest(version, tables=tables, bytes=size)


def change_manifest(version: StoreVersion, **update: Any) -> StoreVersion:
    """A version whose manifest says something else of the same tables."""
    store = version.store
    return store.open_version(store.publish(version.manifest.model_copy(update=update)))


def data_files(version: StoreVersion, table: str) -> list[Path]:
    """The Parquet files of a version's table, on disk."""
    log = version.store.open(table, version.manifest.tables[table])
    paths = pa.table(log.get_add_actions())["path"].to_pylist()
    return [Path(version.store.uri, table, path) for path in sorted(paths)]


def failures(version: StoreVersion, facts: AutoencoderFacts | None = FACTS) -> dict[str, Check]:
    return {check.rule: check for check in verify(version, facts) if check.failed}


def only(found: dict[str, Check], *words: str) -> list[Check]:
    """The failed checks, which are to be of these rules and no others."""
    assert len(found) == len(words), list(found)
    return [next(check for rule, check in found.items() if word in rule) for word in words]
