"""The encode stage on real files; Ray and MLflow are real, the autoencoder is the identity."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folder import BAD, GOOD, SIZE, picture, picture_folder, read_captions, write_captions
from PIL import Image
from test_encode_media import cells
from tiny_runs import encode_here

from ldm_core.latents.reader import LatentReader
from ldm_core.latents.schema import caption_digest, decode_array
from ldm_core.latents.store import LatentStore, StoreVersion
from pipelines import ray_runtime
from pipelines.encode_latents import encode
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, Workers
from pipelines.stage import Options, Record


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def recipe(data: Path, tmp_path_factory) -> Recipe:
    root = tmp_path_factory.mktemp("products")
    return Recipe(
        name="test",
        data=str(data),
        root=str(root / "first"),
        size=SIZE,
        tracking_uri=f"sqlite:///{root}/mlflow.db",
        autoencoder=AutoencoderSection(source="identity"),
        text=TextSection(tiny_width=8),
        # one worker: starting a second costs more than it does here
        encode=EncodeSection(upscale=True, shard_size=5, batch_size=4, workers=Workers(count=1)),
    )


@pytest.fixture(scope="module")
def record(recipe: Recipe, ray_session: None) -> Record:
    """An undisturbed run."""
    return encode(recipe, Options())


@pytest.fixture(scope="module")
def version(recipe: Recipe, record: Record) -> StoreVersion:
    return newest(recipe)


def newest(recipe: Recipe) -> StoreVersion:
    return LatentStore(recipe.product("latents")).open_version()


def copied(recipe: Recipe, folder: Path) -> Recipe:
    """The same project, finished, elsewhere."""
    shutil.copytree(recipe.data, folder / "data")
    shutil.copytree(recipe.root, folder / "root")
    return moved(recipe, folder / "data", folder / "root")


def moved(recipe: Recipe, data: Path, root: Path) -> Recipe:
    return recipe.model_copy(update={"data": str(data), "root": str(root)})


def forbid_ray(monkeypatch) -> None:
    def start(verbose: bool) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_runtime, "start", start)


@pytest.mark.ray
class TestFirstRun:
    def test_every_file_ends_in_exactly_one_table(self, version, record):
        samples = version.table("samples", ["id"])["id"].to_pylist()
        rejects = {row["id"]: row["reason"] for row in version.table("rejects").to_pylist()}
        assert rejects == BAD
        assert len(samples) == len(set(samples)) == GOOD
        assert not set(samples) & set(rejects)
        assert record.summary["rows"] == GOOD + len(BAD)
        assert record.summary["rejects_by_reason"] == dict.fromkeys(BAD.values(), 1)
        assert (record.summary["version"], record.summary["texts"]) == (1, 2 * 8)

    def test_the_latents_of_the_identity_are_the_cropped_pixels(self, version, data):
        for row in version.table("samples").to_pylist()[::5]:
            image = Image.open(data / row["id"])
            assert (row["width"], row["height"]) == image.size
            box = tuple(row[f"crop_{side}"] for side in ("left", "top", "right", "bottom"))
            expected = image.crop(box).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            latent = decode_array(row["latent_mean"], row["latent_shape"]).transpose(1, 2, 0)
            np.testing.assert_allclose((latent + 1) * 127.5, np.asarray(expected), atol=0.13)
            assert row["source_bytes"] == (data / row["id"]).stat().st_size
            assert (row["bucket"], row["media"], row["frames"]) == ("16x16x1", "image", 1)

    def test_texts_are_the_distinct_captions_and_the_empty_one(self, version):
        rows = version.table("texts").to_pylist()
        wanted = {"", "bad", *(f"picture {i}" for i in range(6))}
        for name in ("t5", "clip"):
            assert sorted(row["caption"] for row in rows if row["encoder"] == name) == sorted(
                wanted
            )
        for row in rows:
            assert row["caption_digest"] == caption_digest(row["caption"])
            if row["encoder"] == "t5":  # words and an end token: never the batch's padding
                assert row["tokens_shape"] == [len(row["caption"].split()) + 1, 8]

    def test_the_reader_takes_it(self, version):
        reader = LatentReader(version)
        batch = reader.batch(np.arange(GOOD), np.zeros(GOOD, np.int64), seed=0)
        assert batch.latents.shape == (GOOD, 3, SIZE, SIZE)
        assert torch.isfinite(batch.latents).all()
        assert len(reader.null_condition()) == 1

    def test_shards_are_files_of_at_most_shard_size_rows(self, version):
        rows = version.table("samples", ["shard"])["shard"].value_counts().to_pylist()
        assert max(row["counts"] for row in rows) <= 5
        assert len(rows) == len(list(Path(version.store.uri, "samples").glob("*.parquet")))


@pytest.mark.ray
class TestLaterRuns:
    def test_nothing_new_does_nothing(self, recipe, version, record, monkeypatch, capsys):
        forbid_ray(monkeypatch)
        logs = {name: version.store.open(name).version() for name in version.manifest.tables}
        assert encode(recipe, Options()) == record
        again = encode(recipe, Options(force=True))
        assert again.summary["new_rows"] == again.summary["new_texts"] == 0
        assert again.summary["content"] == record.summary["content"]
        assert version.store.versions() == [1]
        assert logs == {name: version.store.open(name).version() for name in logs}
        printed = capsys.readouterr().out
        assert "nothing new: version 1 stands" in printed
        assert "warning: 5 of 27 rejected: 1 empty file, 1 file missing" in printed
        assert "\n  empty.png: empty file\n" in printed

    def test_one_new_file_is_the_only_one_encoded(self, recipe, version, tmp_path):
        mine = copied(recipe, tmp_path)
        captions = read_captions(Path(mine.data))
        picture(50).save(Path(mine.data, "zz.png"))
        write_captions(Path(mine.data), captions | {"zz.png": "picture 1"})
        record = encode_here(mine)
        assert (record.summary["new_rows"], record.summary["new_texts"]) == (1, 0)
        assert record.summary["removed_rows"] == 0
        assert (record.summary["version"], record.summary["samples"]) == (2, GOOD + 1)
        before = {row["id"]: row for row in version.table("samples").to_pylist()}
        after = {row["id"]: row for row in newest(mine).table("samples").to_pylist()}
        assert {id: after[id] for id in before} == before

    def test_changed_mended_and_vanished_files(self, recipe, version, tmp_path, capsys):
        mine = copied(recipe, tmp_path)
        folder, captions = Path(mine.data), read_captions(Path(mine.data))
        picture(51).resize((40, 40)).save(folder / "001.png")  # another picture
        captions["002.png"] = "picture 5"  # another caption
        (folder / "003.png").unlink()  # gone, and its caption with it
        del captions["003.png"]
        picture(52).save(folder / "truncated.png")  # mended
        write_captions(folder, captions)
        record = encode_here(mine)
        summary = record.summary
        assert (summary["new_rows"], summary["removed_rows"], summary["renamed_rows"]) == (2, 3, 1)
        told = "2 rows new, 3 of changed or vanished files removed, 1 with new captions"
        assert told in capsys.readouterr().out
        now = newest(mine)
        rows = {row["id"]: row for row in now.table("samples").to_pylist()}
        assert rows.keys() == {*version.table("samples")["id"].to_pylist(), "truncated.png"} - {
            "003.png"
        }
        assert rows["001.png"]["width"] == 40
        assert rows["002.png"]["captions"][0]["caption"] == "picture 5"
        assert now.manifest.rejects == {r: 1 for r in BAD.values() if r != "truncated"}
        first = now.store.open_version(1)  # which a running job may still read
        assert first.table("samples").num_rows == GOOD
        assert first.manifest == version.manifest


KILLED = """
import os, signal, sys
from ldm_core.latents.store import LatentStore
from pipelines.encode_latents import encode
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options

commit, calls = LatentStore.commit, []

def commit_three(self, table, *args):
    commit(self, table, *args)
    calls.append(table)
    if calls.count("samples") == 3:
        os.kill(os.getpid(), signal.SIGKILL)

LatentStore.commit = commit_three
encode(Recipe.model_validate_json(sys.argv[1]), Options())
"""


@pytest.mark.ray
@pytest.mark.slow  # of a run that ends, twenty-one kills: test_encode_kills.py
def test_a_killed_job_goes_on_where_it_was(recipe, version, record, tmp_path):
    import ray

    mine = copied(recipe, tmp_path)
    for name in ("samples", "texts", "rejects", "versions", "record.json"):
        path = Path(mine.product("latents"), name)
        path.unlink() if path.is_file() else shutil.rmtree(path)
    address = ray.get_runtime_context().gcs_address
    two = mine.encode.model_copy(update={"workers": Workers(count=2)})  # shards end out of order
    mine_by_two = mine.model_copy(update={"encode": two})
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, mine_by_two.model_dump_json()],
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store = LatentStore(mine.product("latents"))
    assert store.versions() == []
    done = in_order(store)
    assert 0 < len(done) < GOOD
    rejected = store.table("rejects").num_rows
    files = set(store.open("samples").file_uris())

    resumed = encode(mine, Options())
    assert resumed.summary["content"] == record.summary["content"]
    elsewhere = ("source_uri", "fingerprint")  # of copies in another folder
    for table in ("texts", "rejects"):  # of which the content does not tell
        assert cells(newest(mine), table, *elsewhere) == cells(version, table, *elsewhere)
    assert newest(mine).manifest.statistics == version.manifest.statistics
    assert resumed.summary["new_rows"] == GOOD + len(BAD) - len(done) - rejected
    assert files <= set(store.open("samples").file_uris())
    assert done == [row for row in in_order(store) if row["id"] in {r["id"] for r in done}]
    shards = {row["shard"] for row in in_order(version)}
    assert {row["shard"] for row in done} < shards


def in_order(source: LatentStore | StoreVersion) -> list[dict]:
    return source.table("samples").sort_by("id").to_pylist()
