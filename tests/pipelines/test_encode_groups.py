"""Row groups of media: each is looked into by one task, and a dry run tells how often all are
read."""

import io
import json
import random
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_folder import picture
from test_encode_damage import item_of, put_files
from test_encode_estimate import predicted
from test_encode_media import project
from test_encode_reads import group_reads, png  # noqa: F401
from tiny_runs import encode_here

from ldm_core.media.locators import cell_uri
from pipelines.encode_changes import shards_of
from pipelines.encode_groups import group_of, lifted, probe_tasks, reads_to_encode, reads_to_look
from pipelines.recipes.sections import EncodeSection


def rows(*sizes: int) -> list:
    """Cells of row groups of these sizes, as they lie."""
    return [
        item_of(cell_uri("/x.parquet", group, row, "image"))
        for group, size in enumerate(sizes)
        for row in range(size)
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([10] * 13, [60, 60, 10]),
        ([1000, 1000], [1000, 1000]),
        ([30, 100, 30, 30], [30, 100, 60]),
        ([10000], [4096, 4096, 1808]),
    ],
)
def test_tasks_are_cut_where_row_groups_end(sizes, expected):
    entries = rows(*sizes)
    tasks = list(probe_tasks(entries))
    assert [len(task) for task in tasks] == expected
    assert [entry for task in tasks for entry in task] == entries
    reads = sum(len({group_of(entry) for entry in task}) for task in tasks)
    assert reads == reads_to_look(Counter(map(group_of, entries)))


def test_loose_files_are_cut_by_number():
    loose = [item_of(f"/{k}.png") for k in range(150)]
    assert [len(task) for task in probe_tasks(loose)] == [64, 64, 22]
    assert list(probe_tasks([])) == []


@pytest.mark.parametrize("buckets", [1, 4, 20])
def test_reads_to_encode_are_those_of_the_shards(buckets):
    section, rng = EncodeSection(shard_size=50), random.Random(0)
    entries = rows(*[120] * 20, *[7] * 30)
    names = [f"{8 + 8 * rng.randrange(buckets)}x8x1" for _ in entries]
    parts = [
        {**entry, "source": entry["id"], "part": 0, "bucket": name}
        for entry, name in zip(entries, names, strict=True)
    ]
    made = list(shards_of([dict(part) for part in parts], section))
    of_shard = [{group_of(item) for item in json.loads(row["items"])} for row in made]
    counted = sum(map(len, of_shard))
    shares = {name: count / len(parts) for name, count in Counter(names).items()}
    shards = Counter(row["bucket"] for row in made)
    found = reads_to_encode(Counter(map(group_of, entries)), shares, shards)
    print(f"reads predicted / made with {buckets} buckets: {found / counted:.3f}")
    assert found == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("aspect", [1.0, 4.0])
def test_a_dry_run_tells_the_reads_of_a_run(tmp_path: Path, group_reads, aspect):  # noqa: F811
    (tmp_path / "data").mkdir()
    shapes = random.Random(0).choices([(24, 24), (48, 12), (12, 48)], k=60)
    file = tmp_path / "data/all.parquet"
    images = [resized(k, shapes[k]) for k in range(60)]
    pq.write_table(pa.table({"image": images, "caption": ["a"] * 60}), file, row_group_size=15)
    recipe = project(tmp_path, 16, max_aspect=aspect, upscale=True)
    recipe = recipe.model_copy(update={"data": str(file)})
    found = predicted(recipe, 12)
    assert (found.files, found.groups) == (60, 4)
    told = "".join(found.lines(recipe.encode))
    assert f" {found.group_reads:,.0f} reads of 4, whole" in told
    group_reads.clear()
    encode_here(recipe)
    buckets = 1 if aspect == 1 else 3
    assert group_reads.total() == (aspect > 1) * 4 + 4 * buckets
    assert found.group_reads == pytest.approx(group_reads.total(), rel=0.15)


def resized(index: int, size: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    picture(index).resize(size).save(stream, "PNG")
    return stream.getvalue()


def test_what_is_measured_waits_for_no_row_group(tmp_path, group_reads):  # noqa: F811
    images = [png(k) for k in range(8)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", row_group_size=4)
    cells = [
        item_of(cell_uri(str(tmp_path / "x.parquet"), group, row, "image"))
        for group in (0, 1)
        for row in range(4)
    ]
    gone = item_of(cell_uri(str(tmp_path / "gone.parquet"), 0, 0, "image"))
    loose = put_files(tmp_path, 1)
    with lifted([*cells, gone, *loose]) as (found, seconds):
        assert group_reads.total() == 3
        uris = {item["id"]: item["uri"] for item in found}
        assert [read(uris[cell["id"]]) for cell in cells] == images
        assert [uris[item["id"]] for item in (gone, *loose)] == [gone["id"], loose[0]["id"]]
        assert seconds > 0
    assert not fsspec.filesystem("memory").exists("/ldm-lifted")


def read(uri: str) -> bytes:
    with fsspec.open(uri, "rb") as stream:
        return stream.read()
