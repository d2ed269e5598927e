"""Data and products in a bucket, from pictures to a picture; only MLflow's database is local."""

import io
import time

import fsspec
import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image
from tiny_runs import SIZE, encode_here, tiny_recipe, train_here

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.files import file_sizes, join, read_bytes, remove, write_bytes
from ldm_core.generation import PictureGenerator, PictureRequest
from ldm_core.latents.reader import SamplePlan
from ldm_core.latents.store import LatentStore
from ldm_core.media.folder import list_captioned_images
from ldm_core.media.shapes import write_shapes
from ldm_core.model_directory import load_model
from pipelines import train_autoencoder
from pipelines.distill_student import distill_student
from pipelines.model_registry import resolve_model
from pipelines.picture_reader import split
from pipelines.recipes.schema import Recipe
from pipelines.sample_images import sample_images
from pipelines.stage import Options, Record, read_record
from pipelines.train_denoiser import train_denoiser


@pytest.fixture(scope="module")
def recipe(s3: str, tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "data", 32, SIZE, seed=0)
    fsspec.filesystem("s3").put(str(folder / "data"), f"{s3}/project/data", recursive=True)
    sections = {
        # shorter than the tiny recipe's, but each with a checkpoint on the way
        "autoencoder": {"source": "train", "steps": 4, "checkpoint_every": 2, "max_failures": 0},
        "train": {"steps": 4, "checkpoint_every": 2, "sample_every": 4},
        "distill": {"steps": 4, "checkpoint_every": 2, "guidance_steps": 1},
    }
    recipe = tiny_recipe(f"{s3}/project/data", f"{s3}/project/root", workers=1, **sections)
    return recipe.model_copy(update={"tracking_uri": f"sqlite:///{folder}/mlflow.db"})


@pytest.fixture(scope="module")
def records(recipe: Recipe, autoencoder: Record) -> dict[str, Record]:
    """Every stage, one after the other."""
    return {
        "autoencoder": autoencoder,
        "latents": encode_here(recipe),
        "teacher": train_here(train_denoiser, recipe),
        "student": train_here(distill_student, recipe),
    }


@pytest.fixture(scope="module")
def autoencoder(recipe: Recipe) -> Record:
    """Trained in two commands: a picture of the third step cannot be read at first."""
    listing, sizes = list_captioned_images(recipe.data), file_sizes(recipe.data)
    trained, _ = split(len(listing.images), recipe.seed)
    plan = SamplePlan(recipe.seed, len(trained), recipe.autoencoder.batch_size)
    uri = listing.images[trained[plan.rows_at(2, 0, 1)[0][0]]].uri
    picture = read_bytes(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_autoencoder, "list_captioned_images", lambda _: listing)
        patch.setattr(train_autoencoder, "file_sizes", lambda _: sizes)
        remove(uri)
        with pytest.raises(Exception, match=uri.rpartition("/")[2]):
            train_here(train_autoencoder.train_autoencoder, recipe)
    end = time.monotonic() + 120  # it is written in the background
    while not [path for path in checkpoints(recipe) if path.endswith("/manifest.json")]:
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.05)
    write_bytes(uri, picture)
    return train_here(train_autoencoder.train_autoencoder, recipe)


def checkpoints(recipe: Recipe) -> list[str]:
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    return list(fs.find(join(recipe.root, "checkpoints")))


def test_a_checkpoint_in_the_bucket_is_gone_on_from(recipe, records):
    client, record = MlflowClient(recipe.tracking_uri), records["autoencoder"]
    runs = client.search_runs(["1"], "tags.stage = 'autoencoder'")
    assert [run.info.run_id for run in runs] == [record.run_id]  # one, of both commands
    assert checkpoints(recipe) == []


def test_every_product_has_its_record(recipe, records):
    for name, record in records.items():
        assert read_record(recipe.product(name)) == record
        assert record.product == f"{recipe.root}/{name}"


def test_the_autoencoder_trained_there_encodes(recipe, records):
    autoencoder = load_autoencoder(recipe.autoencoder_uri)
    manifest = LatentStore(recipe.product("latents")).open_version().manifest
    assert manifest.autoencoder.digest == autoencoder.digest
    assert manifest.statistics.mean == pytest.approx(autoencoder.latents_mean)
    assert records["autoencoder"].summary["psnr"] > 0


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_model_loads_with_all_it_refers_to(recipe, records, kind):
    config, _, digest = load_model(recipe.product(kind))
    assert digest == records[kind].summary["digest"]
    assert config.autoencoder.uri == recipe.product("autoencoder")
    assert config.t5.uri == recipe.product("text/t5")
    generator = PictureGenerator.load(recipe.product(kind))
    assert generator.generate([PictureRequest("a red circle", 0, steps=1)]).shape[1] == SIZE


def test_a_picture_drawn_into_the_bucket(recipe, records, s3):
    request = PictureRequest("a red circle", 5, steps=2)
    name = resolve_model("models:/shapes@champion", recipe.tracking_uri)
    assert name == recipe.product("student")
    [uri] = sample_images(name, [request], f"{s3}/project/picture.png", None, "cpu")
    picture = np.asarray(Image.open(io.BytesIO(read_bytes(uri))))
    [expected] = PictureGenerator.load(name).generate([request])
    assert np.array_equal(picture, expected)


def test_the_same_commands_again_do_nothing(recipe, records, capsys):
    assert train_autoencoder.train_autoencoder(recipe, Options()) == records["autoencoder"]
    assert train_denoiser(recipe, Options()) == records["teacher"]
    assert distill_student(recipe, Options()) == records["student"]
    assert capsys.readouterr().out.count("up to date") == 3
