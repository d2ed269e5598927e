"""How often the encode stage reads what it needs, with its workers in this process."""

import hashlib
import io
import json
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_runs
from picture_folder import picture, write_captions
from PIL import ExifTags, Image
from test_encode_media import RATE, project, put_videos
from tiny_runs import encode_here

from ldm_core.latents.store import LatentStore
from ldm_core.media import locators
from ldm_core.media.clips import Clip
from ldm_core.media.guarded import GuardedDecoder
from ldm_core.media.locators import MediaReader, member_uri
from pipelines import encode_rounds
from pipelines.encode_files import HEAD_BYTES
from pipelines.encode_media import decode_shard, part_of, probe_entries
from pipelines.encode_plan import Item, describe_autoencoder, encode_job, make_plan
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
    recipe = project(tmp_path, 16, upscale=True, shard_size=ROWS)
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


def test_a_row_group_is_read_once_to_look_and_once_for_all_its_rows(manifest, group_reads):
    assert encode_here(manifest).summary["samples"] == GROUPS * ROWS
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
        content = LatentStore(recipe.product("latents")).open_version().manifest.content
        events.clear()
        summary = encode_here(calm).summary
        assert events[:2] == [4, "commit"]
        assert [event for event in events if event != "commit"] == [4, 8, 8]
        assert (summary["samples"], summary["rejects"]) == (self.COUNT - 1, 1)
        assert summary["content"] == content

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


class TestFilms:
    """Every clip is a shard of its own, as large ones are."""

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Recipe:
        (tmp_path / "data").mkdir()
        put_videos(tmp_path, film=48, other=32)
        return project(tmp_path, 64, frames=8, fps=RATE, shard_size=1)

    @pytest.fixture
    def seen(self, monkeypatch) -> Counter:
        """How often each file is read, and how often one is sent to a child, from now on."""
        counts: Counter = Counter()
        read, decode = MediaReader.read, GuardedDecoder.decode

        def counted_read(self, uri: str) -> bytes:
            counts[Path(uri).name] += 1
            return read(self, uri)

        def counted_decode(self, item, *more):
            counts["sent"] += item is not None
            return decode(self, item, *more)

        monkeypatch.setattr(MediaReader, "read", counted_read)
        monkeypatch.setattr(GuardedDecoder, "decode", counted_decode)
        return counts

    def test_a_film_is_read_once_to_look_and_once_for_all_its_clips(self, recipe, seen, tmp_path):
        summary = encode_here(recipe).summary
        assert (summary["samples"], summary["rejects"]) == (10, 0)
        assert seen == {"film.mp4": 2, "other.mp4": 2, "sent": 4}
        text = recipe.text.model_copy(update={"t5": recipe.t5_uri, "clip": recipe.clip_uri})
        large = recipe.encode.model_copy(update={"shard_size": 100})
        other = {"root": str(tmp_path / "other"), "text": text, "encode": large}
        again = encode_here(recipe.model_copy(update=other)).summary
        assert again["content"] == summary["content"]

    def test_another_film_in_its_place_is_read(self, recipe, seen, tmp_path):
        film, other = (tmp_path / "data" / f"{name}.mp4" for name in ("film", "other"))
        told = [sha_of(recipe)]
        told.append(sha_of(recipe))
        assert seen["film.mp4"] == 1
        film.write_bytes(other.read_bytes())
        told.append(sha_of(recipe))
        whole = hashlib.sha256(other.read_bytes()).hexdigest()
        assert (told[0] == told[1], told[2]) == (True, whole)


def sha_of(recipe: Recipe) -> str:
    """That of the film, as a shard of its first clip tells it."""
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    entry, clip = plan.entries["film.mp4"], Clip(0.0, 8, RATE)
    items = [{**part_of(entry, clip), "part": 0, "parts": 1}]
    row = {"shard": "s", "bucket": "64x64x8", "items": json.dumps(items)}
    [item] = json.loads(decode_shard(row, plan.job)["items"])
    return item["sha256"]


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


class TestBeginnings:
    """Of which pictures a beginning is enough, however they are named."""

    @pytest.fixture
    def whole(self, monkeypatch) -> list[str]:
        """Locators of what is read whole from now on."""
        read, seen = MediaReader.read, list[str]()

        def watched(self, uri: str) -> bytes:
            seen.append(uri)
            return read(self, uri)

        monkeypatch.setattr(MediaReader, "read", watched)
        return seen

    def test_a_jpeg_in_an_archive_has_no_extension(self, photographs, whole, tmp_path):
        data = (tmp_path / "data/early.jpg").read_bytes()
        archive = tmp_path / "some.tar"
        archive.write_bytes(bytes(512) + data)
        item = {"id": "some.tar/000001", "uri": member_uri(str(archive), 512, len(data))}
        assert stands_upright(photographs, item, len(data))
        assert whole == []

    def test_a_png_with_a_jpegs_name_may_be_turned_at_its_end(self, photographs, whole, tmp_path):
        file = tmp_path / "data/named.jpg"
        file.write_bytes(turned_at_its_end())
        item = {"id": "named.jpg", "uri": str(file)}
        assert stands_upright(photographs, item, file.stat().st_size)
        assert whole == [str(file)]


def stands_upright(recipe: Recipe, item: Item, size: int) -> bool:
    """Whether a picture of so many bytes is found to be higher than wide."""
    assert size > HEAD_BYTES
    entry = {"kind": "image", "size": size, "captions": [], "fingerprint": "f", **item}
    job = encode_job(recipe.located(), describe_autoencoder(recipe.located()))
    [part] = json.loads(probe_entries({"items": json.dumps([entry])}, job)["items"])
    height, width = map(int, part["bucket"].split("x")[:2])
    return height > width


def turned_at_its_end() -> bytes:
    """A PNG of noise, 300 x 600, that an eXIf chunk after all its pixels lays on its side."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    exif = b"eXIf" + turned.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    png, end = stream.getvalue()[:-12], stream.getvalue()[-12:]
    return png + chunk + end
