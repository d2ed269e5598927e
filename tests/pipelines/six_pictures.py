"""A project of six captioned pictures, encoded once in a test run: each test changes a copy."""

import shutil
from pathlib import Path

import pytest
from made_once import made_once
from picture_folder import picture, write_captions
from test_encode_media import project
from tiny_runs import encode_here

from ldm_core.latents.store import LatentStore, StoreVersion
from pipelines.recipes.schema import Recipe

COUNT = 6


@pytest.fixture
def recipe(shared_folder: Path, tmp_path: Path) -> Recipe:
    """Of the test's own copy. The tracking store stays behind, as it tells where it lies."""
    encoded = made_once(shared_folder, "six_pictures", _encode)
    tracking = shutil.ignore_patterns("mlflow*", "mlruns")
    shutil.copytree(encoded, tmp_path, ignore=tracking, dirs_exist_ok=True)  # as old as they were
    return _project(tmp_path)


def newest(recipe: Recipe) -> StoreVersion:
    return LatentStore(recipe.product("latents")).open_version()


def _project(folder: Path) -> Recipe:
    return project(folder, 16, max_aspect=1, upscale=True)


def _encode(folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    for k in range(COUNT):
        picture(k).save(data / f"{k}.png")
    write_captions(data, {f"{k}.png": f"picture {k}" for k in range(COUNT)})
    encode_here(_project(folder))
