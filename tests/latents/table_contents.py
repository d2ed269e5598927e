"""What the tables of a store hold, and whether they hold."""

import pyarrow as pa

from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.verify import verify


def rows_of(store: LatentStore, table: str, number: int | None = None) -> pa.Table:
    return store.table(table, number).sort_by("id" if table != "texts" else "caption")


def ids_of(store: LatentStore) -> list[str]:
    return sorted(store.table("samples", columns=["id"])["id"].to_pylist())


def holds(version: StoreVersion) -> bool:
    return not any(check.failed for check in verify(version, None))


def live(store: LatentStore, table: str = "samples") -> pa.Table:
    return pa.table(store.open(table).get_add_actions())
