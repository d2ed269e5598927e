"""What the encode stage refuses, on real files, and how it says so."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from picture_folder import SIZE, picture_folder, write_captions
from ray.util.placement_group import placement_group, remove_placement_group
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import AutoencoderFacts
from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from pipelines import encode_plan
from pipelines.encode_latents import _check_tables, encode
from pipelines.encode_on_ray import encode_shards
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.exit_codes import exit_code
from pipelines.ray_runtime import check_room
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, TextSection, Workers
from pipelines.stage import Options


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    return Recipe(
        name="test",
        data=str(data),
        root=str(tmp_path / "root"),
        size=SIZE,
        autoencoder=AutoencoderSection(source="identity"),
        text=TextSection(tiny_width=8),
    )


def changed(recipe: Recipe, data: str | None = None, **encode: object) -> Recipe:
    """The recipe with other data and settings of `encode`."""
    section = recipe.encode.model_copy(update=encode)
    return recipe.model_copy(update={"encode": section, "data": data or recipe.data})


@pytest.mark.ray
def test_what_only_a_worker_finds_is_told_in_one_line(data, recipe, ray_session, capsys):
    gone = {"id": "gone", "source": "gone", "kind": "image", "uri": str(data / "gone.png")}
    bucket = f"{SIZE}x{SIZE}x1"
    rows = [{"shard": "s", "bucket": bucket, "encoder": "", "items": json.dumps([gone])}]
    job = replace(make_plan(recipe, describe_autoencoder(recipe)).job, witnesses=())
    capsys.readouterr()
    assert exit_code(lambda: list(encode_shards(rows, job, Workers(), verbose=False)), []) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ldm: {data}/gone.png was listed but a worker cannot read it")
    assert line.endswith("it goes on from what is finished")


@pytest.mark.ray
def test_a_failed_job_gives_its_cpus_back(data, recipe, ray_session):
    """To what asks for all of them next, without waiting for the garbage collector's turn."""
    job = make_plan(recipe, describe_autoencoder(recipe)).job
    rows = [{"shard": "s", "bucket": "8x8x1", "encoder": "", "items": "no list"}]
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ray.exceptions.RayTaskError):
            list(encode_shards(rows, job, Workers(), verbose=False))
        check_room("train", 2, 0, "")
        both = placement_group([{"CPU": 1}, {"CPU": 1}])
        assert both.wait(60)
        remove_placement_group(both)
    finally:
        gc.enable()


def test_no_usable_file_is_the_users_mistake(recipe, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    (folder / "b.png").write_text("no picture")
    write_captions(folder, {"a.png": "a", "b.png": "b"})
    mine = changed(recipe, data=str(folder), max_reject_share=1)
    with pytest.raises(UserError, match="none of the 2 files could be used: 1 empty file, 1 not"):
        encode_here(mine)
    assert LatentStore(mine.product("latents")).versions() == []


def test_a_size_the_autoencoder_cannot_take(recipe, tmp_path, monkeypatch):
    coarse = AutoencoderFacts("identity", 8, None, None, None)
    monkeypatch.setattr(encode_plan, "autoencoder_facts", lambda uri: coarse)
    mine = recipe.model_copy(update={"size": 20})
    with pytest.raises(UserError, match=r"size 20 .* downsampling 8: try --set size=16"):
        encode(mine, Options())


def test_two_jobs_at_once_are_noticed(recipe, tmp_path):
    plan = make_plan(recipe, describe_autoencoder(recipe))
    store = LatentStore(plan.job.store)
    store.create()
    with pytest.raises(UserError, match=r"27 files and 16 caption embeddings missing, 0 rows that"):
        _check_tables(plan, store)
