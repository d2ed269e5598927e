"""What a dry run predicts of bytes and samples, against what the run then makes; hours are measured
by `make bench-encode`."""

from pathlib import Path

import numpy as np
import pytest
from picture_folder import write_captions
from PIL import Image
from test_encode_media import encoded, project, put_videos

from ldm_core.latents.store import LatentStore
from pipelines.encode_changes import media_to_do
from pipelines.encode_estimate import Estimate, estimate
from pipelines.encode_latents import MEASURED
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.recipes.schema import Recipe

WORDS = ("a", "red", "old", "house", "by", "the", "sea", "with", "two", "dogs", "and", "clouds")


def predicted(recipe: Recipe, count: int = MEASURED) -> Estimate:
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    found = estimate(plan, media_to_do(plan, LatentStore(plan.job.store)), recipe.encode, count)
    assert found
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


def put_pictures(folder: Path, count: int) -> None:
    """Noise of all strengths, which compresses to files and latents of all sizes."""
    rng, captions = np.random.default_rng(0), {}
    for k in range(count):
        pixels = 128 + rng.normal(size=(32, 32, 3)) * rng.uniform(0, 60)
        name = f"{k:04d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "data" / name)
        captions[name] = " ".join(rng.choice(WORDS, rng.integers(4, 40)))
    write_captions(folder / "data", captions)


@pytest.mark.parametrize("dtype", ["float16", "int8-b16"])
def test_bytes_of_a_run_twenty_times_as_large(folder, dtype):
    count = 16
    put_pictures(folder, 20 * count)
    recipe = project(folder, 32, max_aspect=1, text_dtype=dtype)
    before = predicted(recipe, count)
    manifest = encoded(recipe).manifest
    assert (before.files, before.measured, before.samples) == (20 * count, count, 20 * count)
    assert before.bytes == pytest.approx(manifest.bytes, rel=0.2)
    print(f"bytes predicted / made: {before.bytes / manifest.bytes:.3f}")


def test_samples_of_videos_are_their_clips(folder):
    put_videos(folder, a=34, b=34, c=34, d=34)
    recipe = project(folder, 32, frames=17, fps=8)
    before = predicted(recipe, 2)
    assert (before.files, before.measured, before.samples) == (4, 2, 8)
    assert encoded(recipe).manifest.counts["samples"] == 8


def test_nothing_new_takes_nothing(folder):
    put_pictures(folder, 3)
    recipe = project(folder, 32, max_aspect=1)
    encoded(recipe)
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    todo = media_to_do(plan, LatentStore(plan.job.store))
    assert estimate(plan, todo, recipe.encode, MEASURED) is None
