"""How often the encode stage reads what it needs, with its workers in this process."""

import io
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_folder import picture
from test_encode_media import project
from tiny_runs import encode_here

from ldm_core.media import locators
from pipelines.recipes.schema import Recipe

GROUPS, ROWS = 6, 10


def png(index: int) -> bytes:
    stream = io.BytesIO()
    picture(index).resize((24, 24)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def manifest(tmp_path: Path) -> Recipe:
    """Pictures in row groups, with ids in an order that has nothing to do with theirs."""
    count = GROUPS * ROWS
    ids = [f"{k:03d}" for k in random.Random(0).sample(range(count), count)]
    columns = {
        "id": ids,
        "image": [png(k) for k in range(count)],
        "caption": [f"picture {k}" for k in range(count)],
    }
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/all.parquet", row_group_size=ROWS)
    recipe = project(tmp_path, 16, max_aspect=1, upscale=True, shard_size=ROWS)
    return recipe.model_copy(update={"data": f"{recipe.data}/all.parquet"})


@pytest.fixture
def group_reads(monkeypatch) -> Counter:
    """How often each row group is read from now on."""
    reads: Counter = Counter()
    read = locators._read_column

    def counted(file: str, row_group: int, column: str) -> pa.ChunkedArray:
        reads[row_group] += 1
        return read(file, row_group, column)

    monkeypatch.setattr(locators, "_read_column", counted)
    return reads


def test_every_row_group_is_read_once_whatever_the_ids(manifest, group_reads):
    assert encode_here(manifest).summary["samples"] == GROUPS * ROWS
    assert group_reads == dict.fromkeys(range(GROUPS), 1)


def test_looking_into_rows_reads_every_row_group_once_more(manifest, group_reads):
    shaped = manifest.encode.model_copy(update={"max_aspect": 2.0})
    encode_here(manifest.model_copy(update={"encode": shaped}))
    assert group_reads == dict.fromkeys(range(GROUPS), 2)
