"""Settings of training that change how it is computed, or on what, through the whole stage."""

from collections import Counter
from pathlib import Path

import pytest
from tiny_runs import SIZE, encode_here, tiny_recipe, train_here

from ldm_core.latents.reader import sample_key
from ldm_core.latents.store import LatentStore
from ldm_core.media.shapes import write_shapes
from pipelines import denoiser_worker
from pipelines.recipes.schema import Recipe
from pipelines.recipes.train_section import StoreShare
from pipelines.stage import Record
from pipelines.train_denoiser import train_denoiser

COUNTS = {"own": 12, "other": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two data sets, encoded by the same encoders."""
    place = tmp_path_factory.mktemp("project")
    for seed, (name, count) in enumerate(COUNTS.items()):
        write_shapes(place / name / "data", count, SIZE, seed=seed)
        if name != "own":
            (place / name / "text").symlink_to(place / "own" / "text")
        encode_here(tiny_recipe(str(place / name / "data"), str(place / name)))
    return place


def train(place: Path, name: str, **train) -> tuple[Recipe, Record]:
    """With the latents of the first data set."""
    settings = {
        "steps": 20, "batch_size": 4, "checkpoint_every": 20, "sample_every": 1000,
        "validation_samples": 0, "sample_steps": 1, "micro_batches": 1,
    }  # fmt: skip
    recipe = tiny_recipe(str(place / "own" / "data"), str(place / name), 1, train=settings | train)
    Path(recipe.root).mkdir()
    for product in ("latents", "text"):
        Path(recipe.root, product).symlink_to(place / "own" / product)
    return recipe, train_here(train_denoiser, recipe)


def keys_of(store: Path) -> set[int]:
    ids = LatentStore(str(store)).open_version().table("samples", ["id"])["id"]
    return {sample_key(each) for each in ids.to_pylist()}


@pytest.fixture(scope="module")
def plain(place) -> Record:
    return train(place, "plain")[1]


@pytest.mark.parametrize(
    "switch",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"spike_factor": 100.0},
    ],
)
def test_what_saves_memory_or_guards_changes_no_bit(place, plain, switch):
    name = "-".join(map(str, next(iter(switch.items()))))
    _, record = train(place, name, **switch)
    assert record.summary["digest"] == plain.summary["digest"]


def test_steps_that_the_guard_refuses_are_not_made(place, plain):
    _, record = train(place, "skipping", spike_factor=1e-6)
    assert record.summary["digest"] != plain.summary["digest"]


def test_a_mix_is_read_by_its_weights(place, monkeypatch):
    """Five epochs in twenty steps: each is the first store once and half of the second."""
    seen: Counter[int] = Counter()
    draw = denoiser_worker.drawn

    def drawn(recipe, batch, step):
        seen.update(batch.ids.tolist())
        return draw(recipe, batch, step)

    monkeypatch.setattr(denoiser_worker, "drawn", drawn)
    other = StoreShare(uri=str(place / "other" / "latents"), weight=0.5)
    train(place, "mixed", mix=[other])
    mine, theirs = (keys_of(place / name / "latents") for name in COUNTS)
    assert (len(mine), len(theirs), mine | theirs) == (*COUNTS.values(), set(seen))
    assert theirs < mine  # ids are names in a store, and both stores begin with the same
    assert {seen[key] for key in mine - theirs} == {5}
    assert {seen[key] for key in theirs} == {5 + 2, 5 + 3}
