"""Stores whose CLIP rows have tokens too: what training reads is what it read without them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bucket_store import SQUARE, bucket_store
from store_texts import in_eight_bits

from ldm_core.latents.compact import compact
from ldm_core.latents.reader import LatentReader
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import TEXTS, encode_array
from ldm_core.latents.store import StoreVersion
from ldm_core.latents.verify import verify
from ldm_core.reading.index import index_store
from ldm_core.reading.stream import StreamReader


def with_clip_tokens(version: StoreVersion, width: int) -> StoreVersion:
    """A version whose CLIP rows have two tokens more than words, in row groups with T5's."""
    store, rows = version.store, version.table("texts").to_pylist()
    rows.sort(key=lambda row: (row["caption"], row["encoder"]))  # clip, t5, clip, t5
    for row in rows:
        if row["encoder"] == "clip":
            tokens = torch.full((len(row["caption"].split()) + 2, width), 7.0)
            row |= {"tokens": encode_array(tokens), "tokens_shape": list(tokens.shape)}
    delete_rows(store, "texts", version.table("texts").select(["caption_digest", "encoder"]))
    part = store.write_part("texts", pa.Table.from_pylist(rows, schema=TEXTS), "both")
    store.commit("texts", [part], "both")
    return published(version)


def published(version: StoreVersion) -> StoreVersion:
    store = version.store
    tables = version.manifest.tables | {"texts": store.open("texts").version()}
    size = sum(store.bytes(name, number) for name, number in tables.items())
    update = {"tables": tables, "bytes": size}
    return store.open_version(store.publish(version.manifest.model_copy(update=update)))


def batches(version: StoreVersion) -> list[tuple[torch.Tensor, ...]]:
    options = {"seed": 0, "lanes": 2, "budget": 64, "tokens": lambda bucket: 16}
    with StreamReader([index_store(version)], **options, window_bytes=5000) as reader:
        found = [batch for step in range(3) for batch in reader.batches(step)]
        return [(b.ids, b.condition.tokens, b.condition.mask, b.condition.pooled) for b in found]


def failed(version: StoreVersion) -> list[str]:
    return [check.rule for check in verify(version, None) if check.failed]


def assert_same(one: StoreVersion, other: StoreVersion, rtol: float = 0) -> None:
    near = {"rtol": rtol, "atol": 0}
    for before, after in zip(batches(one), batches(other), strict=True):
        torch.testing.assert_close(before, after, **near)
    rows, epochs = np.arange(8), np.zeros(8, int)
    before, after = (LatentReader(each).batch(rows, epochs, 0).condition for each in (one, other))
    torch.testing.assert_close(before.tokens, after.tokens, **near)
    torch.testing.assert_close(before.pooled, after.pooled, **near)


@pytest.mark.parametrize("width", [3, 5])  # 5 is T5's
def test_training_reads_t5s_tokens_and_clips_vectors(tmp_path: Path, width):
    without = bucket_store(tmp_path / "a", {SQUARE: 30})
    both = with_clip_tokens(bucket_store(tmp_path / "b", {SQUARE: 30}), width)
    [file] = {uri.rpartition("/")[2] for uri in both.store.open("texts").file_uris()}
    table = pq.ParquetFile(f"{both.store.uri}/texts/{file}").read_row_group(0)
    assert {shape[1] for shape in table["tokens_shape"].to_pylist()} == {width, 5}  # in one
    assert_same(without, both)
    assert index_store(without).texts.mean_bytes == index_store(both).texts.mean_bytes
    assert failed(both) == []
    assert_same(without, in_eight_bits(both), rtol=0.01)


def test_a_file_of_clips_rows_alone(tmp_path: Path):
    """As the encode job writes them: encoder by encoder, later compacted."""
    without = bucket_store(tmp_path / "a", {SQUARE: 30})
    both = with_clip_tokens(bucket_store(tmp_path / "b", {SQUARE: 30}), 3)
    store, rows = both.store, both.table("texts").to_pylist()
    delete_rows(store, "texts", both.table("texts").select(["caption_digest", "encoder"]))
    for name in ("t5", "clip"):
        some = [row for row in rows if row["encoder"] == name]
        part = store.write_part("texts", pa.Table.from_pylist(some, schema=TEXTS), name)
        store.commit("texts", [part], name)
    apart = published(both)
    assert_same(without, apart)
    compact(store, "texts", 2**20)
    assert len(store.open("texts").file_uris()) == 1
    assert_same(without, published(apart))
