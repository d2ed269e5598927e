"""The card is true, and what it tells others to run runs: Delta, Polars, DuckDB and pandas."""

import re
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pytest
from deltalake import DeltaTable
from store_faults import add_sample, data_files, sound_store
from written_stores import laid_down

from ldm_core.files import read_bytes
from ldm_core.latents.card import store_card, write_card
from ldm_core.latents.compact import compact, publish_compacted
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TABLES, decode_array
from ldm_core.latents.store import StoreVersion


@pytest.fixture
def version(tmp_path: Path) -> StoreVersion:
    """Not the present state of the tables, whose files are of three kinds of writers."""
    store = laid_down(tmp_path / "store", write).store  # Polars finds no files in "a store"
    return store.open_version(store.versions()[-2])


def write(uri: str) -> None:
    store = sound_store(uri).store
    add_sample(store, "new.png", "a caption with ' and \"")
    compact(store, "samples", 2**20)
    publish_compacted(store)
    add_sample(store, "other.png")
    delete_rows(store, "samples", keys("000.png", "new.png"))
    add_sample(store, "last.png")
    add_sample(store, "later.png")


def keys(*ids: str):
    import pyarrow as pa

    return pa.table({"id": list(ids)})


def blocks(version: StoreVersion) -> list[str]:
    return re.findall(r"```python\n(.*?)```", store_card(version.manifest), re.DOTALL)


def test_says_what_the_manifest_says(version):
    card, manifest = store_card(version.manifest), version.manifest
    assert card.startswith("---\n")
    assert f"version {version.number} of {manifest.created[:10]}" in card
    assert "- 13 samples, 5 distinct captions with the empty one, 2 rejects\n" in card
    assert "| 4x4x1 | 13 |" in card
    assert "| not an image | 2 |" in card
    assert "| t5 | `t` | `t5` |" in card
    assert manifest.content in card
    for schema in TABLES.values():
        assert all(f"`{field.name}` {field.type}" in card for field in schema)
    assert not re.search(r"\{\w*\}", card.split("## Reading")[0])


def test_without_rejects(version):
    assert "| none | 0 |" in store_card(version.manifest.model_copy(update={"rejects": {}}))


def test_is_written_beside_the_tables(version, s3):
    write_card(version.store, version.manifest)
    assert read_bytes(f"{version.store.uri}/README.md").decode() == store_card(version.manifest)
    bucket = sound_store(f"{s3}/card/a store")
    write_card(bucket.store, bucket.manifest)
    assert read_bytes(f"{bucket.store.uri}/README.md").startswith(b"---\ntags")


def test_its_examples_read_the_version(version, monkeypatch):
    monkeypatch.chdir(version.store.uri)
    delta, with_polars, with_duckdb = ({} for _ in range(3))
    for code, names in zip(blocks(version), (delta, with_polars, with_duckdb), strict=True):
        exec(code, names)
    rows = version.table("samples").to_pylist()
    ids = sorted(row["id"] for row in rows)
    assert sorted(delta["table"]["id"].to_pylist()) == sorted(delta["frame"]["id"]) == ids
    row = next(row for row in rows if row["id"] == delta["first"]["id"])
    expected = decode_array(row["latent_mean"], row["latent_shape"])
    np.testing.assert_array_equal(delta["latent"], expected)
    captions = sorted(version.table("texts")["caption"].to_pylist(), key=len)
    assert with_polars["longest"]["caption"].to_list()[-1] == captions[-1]
    assert with_polars["longest"].height == len(captions) == version.manifest.counts["texts"]
    assert with_duckdb["buckets"] == [("4x4x1", 13)]


def cells(value: object) -> object:
    """As lists, whatever a library returns."""
    if isinstance(value, np.ndarray):
        return [cells(each) for each in value]
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, float) and np.isnan(value):
        return None  # pandas has no other null for numbers
    return value


@pytest.mark.parametrize("table", TABLES)
def test_every_value_of_every_column_is_the_same_in_every_tool(version, table):
    """DuckDB reads the files the log lists: its `delta` extension comes from the network."""
    names, at = TABLES[table].names, version.manifest.tables[table]
    log = DeltaTable(f"{version.store.uri}/{table}", version=at)
    ours = version.table(table)
    key = names.index("id") if "id" in names else names.index("caption")

    def of_frame(frame: pandas.DataFrame) -> list[tuple]:
        return [tuple(map(cells, row)) for row in frame[names].itertuples(index=False)]

    files = [str(path) for path in data_files(version, table)]
    columns = ", ".join(f'"{name}"' for name in names)
    queried = duckdb.execute(f"SELECT {columns} FROM read_parquet(?)", [files]).fetchall()
    scanned = polars.read_delta(f"{version.store.uri}/{table}", version=at).select(names)
    found = {
        "deltalake": [
            tuple(row.values()) for row in log.to_pyarrow_table(columns=names).to_pylist()
        ],
        "pandas": of_frame(log.to_pandas()),
        "bare pandas": of_frame(pandas.concat(map(pandas.read_parquet, files))),
        "polars": [tuple(map(cells, row)) for row in scanned.rows()],
        "duckdb": [tuple(map(cells, row)) for row in queried],
    }
    expected = sorted(
        (tuple(row.values()) for row in ours.to_pylist()), key=lambda r: order(r, key)
    )
    for tool, rows in found.items():
        assert sorted(rows, key=lambda r: order(r, key)) == expected, tool


def order(row: tuple, key: int) -> str:
    """By id, or by caption and encoder."""
    return f"{row[key]} {row[key + 1]}"
