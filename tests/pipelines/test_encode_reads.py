"""How often the encode stage reads what it needs, with its workers in this process."""

import io
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_runs
from picture_folder import picture, write_captions
from PIL import ExifTags, Image
from test_encode_media import project
from tiny_runs import encode_here

from ldm_core.latents.store import LatentStore
from ldm_core.media import locators
from ldm_core.media.locators import MediaReader
from pipelines import encode_rounds
from pipelines.encode_files import HEAD_BYTES
from pipelines.encode_media import probe_entries
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.encode_rounds import rounds
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


class TestRounds:
    """What is looked into is encoded before more is looked into."""

    COUNT = 20

    @pytest.fixture
    def recipe(self, tmp_path: Path, monkeypatch) -> Recipe:
        """Pictures of three shapes, of which four are looked into at first."""
        monkeypatch.setattr(encode_rounds, "FIRST_FILES", 4)
        (tmp_path / "data").mkdir()
        names = [f"{k:02d}.png" for k in range(self.COUNT)]
        for k, name in enumerate(names):
            picture(k).resize(((24, 24), (40, 20), (20, 40))[k % 3]).save(tmp_path / "data" / name)
        (tmp_path / "data/03.png").write_text("no picture")
        write_captions(tmp_path / "data", {name: f"picture {name}" for name in names})
        return project(tmp_path, 16, upscale=True, shard_size=3)

    @pytest.fixture
    def events(self, monkeypatch) -> list[str | int]:
        """Files that are looked into, by number, and commits of samples, from now on."""
        seen: list[str | int] = []
        probe, commit = tiny_runs.probe_entries, LatentStore.commit

        def probed(row, job):
            seen.append(len(json.loads(row["items"])))
            return probe(row, job)

        def committed(self, table, *args):
            commit(self, table, *args)
            if table == "samples":
                seen.append("commit")

        monkeypatch.setattr(tiny_runs, "probe_entries", probed)
        monkeypatch.setattr(LatentStore, "commit", committed)
        return seen

    def test_twice_as_many_each_time(self, recipe, events):
        summary = encode_here(recipe).summary
        assert [event for event in events if event != "commit"] == [4, 8, 8]
        assert events[:2] == [4, "commit"]
        assert (summary["samples"], summary["rejects"]) == (self.COUNT - 1, 1)
        assert summary["new_rows"] == self.COUNT

    def test_what_a_round_has_made_is_not_looked_into_again(self, recipe, events, tmp_path):
        def end_at_the_second(row, job, probe=tiny_runs.probe_entries):
            if 4 in events:
                raise KeyboardInterrupt
            return probe(row, job)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_runs, "probe_entries", end_at_the_second)
            with pytest.raises(KeyboardInterrupt):
                encode_here(recipe)
        events.clear()
        assert encode_here(recipe).summary["new_rows"] == self.COUNT - 4
        assert [event for event in events if event != "commit"] == [4, 8, 4]
        text = recipe.text.model_copy(update={"t5": recipe.t5_uri, "clip": recipe.clip_uri})
        calm = recipe.model_copy(update={"root": str(tmp_path / "calm"), "text": text})
        stores = [LatentStore(each.product("latents")) for each in (recipe, calm)]
        encode_here(calm)
        first, second = (store.open_version().manifest.content for store in stores)
        assert first == second

    def test_all_that_a_listing_tells_goes_at_once(self, recipe, events):
        square = recipe.encode.model_copy(update={"max_aspect": 1.0})
        encode_here(recipe.model_copy(update={"encode": square}))
        assert set(events) == {"commit"}

    def test_rounds_are_of_bytes_too(self, recipe, monkeypatch):
        monkeypatch.setattr(encode_rounds, "FIRST_BYTES", 10)
        sizes = {"a": 6, "b": 6, "c": 6, "d": 6, "e": None, "f": 30, "g": 100, "h": 1}
        unknown = [{"id": id, "size": size} for id, size in sizes.items()]
        found = rounds([*sizes, "known"], unknown)
        assert found == [["known", "a"], ["b", "c", "d", "e"], ["f"], ["g"], ["h"]]
        assert rounds(["known"], []) == [["known"]]
        assert rounds([], []) == [[]]


@pytest.fixture
def photographs(tmp_path: Path) -> Recipe:
    """Two JPEGs of many bytes that lie on their side; of one the size comes late."""
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name, comment in (("early.jpg", b""), ("late.jpg", bytes(60000))):
        save = {"quality": 95, "exif": turned, "icc_profile": 2 * comment}
        Image.fromarray(pixels).save(tmp_path / "data" / name, **save)
    write_captions(tmp_path / "data", {"early.jpg": "a", "late.jpg": "b"})
    return project(tmp_path, 64)


def test_of_a_photograph_the_beginning_tells_its_shape(photographs, monkeypatch):
    plan = make_plan(photographs.located(), describe_autoencoder(photographs.located()))
    read, whole = MediaReader.read, []

    def watched(self, uri: str) -> bytes:
        whole.append(Path(uri).name)
        return read(self, uri)

    monkeypatch.setattr(MediaReader, "read", watched)
    entries = list(plan.entries.values())
    assert all(entry["size"] > 2 * HEAD_BYTES for entry in entries)
    found = json.loads(probe_entries({"items": json.dumps(entries)}, plan.job)["items"])
    shapes = [tuple(map(int, part["bucket"].split("x")))[:2] for part in found]
    assert [height > width for height, width in shapes] == [True, True]
    assert whole == ["late.jpg"]
