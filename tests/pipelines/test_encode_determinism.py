"""The rows of a store are the same however many workers made them, wherever it lies."""

from pathlib import Path

import fsspec
import pytest
from picture_folder import SIZE, picture_folder, read_captions, write_captions
from test_encode_media import cells, saved, tiny_kl
from tiny_runs import encode_here
from video_files import encode as video_file
from video_files import numbered

from ldm_core.latents.store import LatentStore, StoreVersion
from pipelines.encode_latents import encode
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, Workers
from pipelines.stage import Options

VIDEOS = ("a.mp4", "b.mp4")


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Recipe:
    """Pictures and videos, with an autoencoder that computes."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "data").mkdir()
    data = picture_folder(folder / "data")
    for number, name in enumerate(VIDEOS):
        (data / name).write_bytes(video_file(numbered(9 + number, 32, 32), fps=8))
    write_captions(data, read_captions(data) | dict.fromkeys(VIDEOS, "a video"))
    return Recipe(
        name="test",
        data=str(data),
        root=str(folder / "root"),
        size=SIZE,
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        autoencoder=AutoencoderSection(source=saved(tiny_kl(), folder / "kl")),
        text=TextSection(tiny_width=8),
        encode=EncodeSection(upscale=True, shard_size=5, batch_size=4, frames=4, fps=8),
    )


@pytest.fixture(scope="module")
def version(calm: Recipe) -> StoreVersion:
    """Made in this process."""
    encode_here(calm)
    return newest(calm)


def newest(recipe: Recipe) -> StoreVersion:
    return LatentStore(recipe.product("latents")).open_version()


def by(calm: Recipe, workers: int) -> EncodeSection:
    """In smaller shards, which end out of order."""
    each = Workers(count=workers, cpus=0.5)
    return calm.encode.model_copy(update={"shard_size": 2, "workers": each})


def check_same(mine: StoreVersion, version: StoreVersion, *elsewhere: str) -> None:
    """All but where the files lie."""
    assert version.manifest.buckets == {"16x16x1": 23, "16x16x2": 1, "16x16x4": 4}
    assert mine.manifest.content == version.manifest.content
    assert mine.manifest.statistics == version.manifest.statistics
    for table in ("samples", "texts", "rejects"):
        assert cells(mine, table, *elsewhere) == cells(version, table, *elsewhere)


WORKERS = [pytest.param(1, marks=pytest.mark.slow), 4]


@pytest.mark.ray
@pytest.mark.parametrize("workers", WORKERS)
def test_workers_on_a_bucket_give_the_same_rows(calm, version, s3, ray_session, workers):
    place = f"{s3}/determinism/{workers}"
    fsspec.filesystem("s3").put(calm.data, f"{place}/pictures", recursive=True)
    away = {"data": f"{place}/pictures", "root": f"{place}/products"}
    mine = calm.model_copy(update={**away, "encode": by(calm, workers)})
    encode(mine, Options())
    check_same(newest(mine), version, "source_uri", "fingerprint")
    uris = newest(mine).table("samples", ["source_uri"])["source_uri"].to_pylist()
    assert all(uri.startswith(f"{place}/pictures/") for uri in uris)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_on_a_disk_give_the_same_rows(calm, version, ray_session, tmp_path: Path, workers):
    mine = calm.model_copy(update={"root": str(tmp_path), "encode": by(calm, workers)})
    encode(mine, Options())
    check_same(newest(mine), version)
