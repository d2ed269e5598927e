"""Which model the registry's alias moves to, and that its folder stays the champion's."""

import math
import re
import shlex
from pathlib import Path

import pytest
from tiny_project import backbone, model_config, random_network

from ldm_core.model_directory import Reference, load_model, save_model
from pipelines.model_registry import named_version, register_model, resolve_model
from pipelines.promotion import (
    CHAMPION,
    Champion,
    Score,
    against,
    copy_beside,
    decide,
    save_champion,
)
from pipelines.recipes import RECIPES
from pipelines.tracking import track

NAME = "shapes-teacher"
HALF = Score(0.5, "store-1", "rows-1")
TEXTS = {name: Reference(uri=f"/far/{name}", digest=f"of {name}") for name in ("t5", "clip")}


@pytest.mark.parametrize(
    ("there", "mine", "promoted", "reason"),
    [
        (HALF, Score(0.25, "store-1", "rows-1"), True, "is 0.25, that of version 3.* was 0.5"),
        (HALF, Score(0.5, "store-1", "rows-1"), False, "is 0.5, that of version 3.* is 0.5"),
        (HALF, Score(math.nan, "store-1", "rows-1"), False, "is nan"),
        (Score(math.nan, "store-1", "rows-1"), HALF, True, "was nan"),
        (HALF, Score(0.25, "store-2", "rows-1"), False, "content .* store-2 here and store-1 of"),
        (HALF, Score(0.25, "store-1", "rows-2"), False, "held-out .* rows-2 here and rows-1 of"),
        (HALF, None, False, "not known"),
        (None, HALF, False, "version 3.* tells no validation loss"),
    ],
)
def test_better_is_lower_on_the_same_rows(there, mine, promoted, reason):
    decision = against(Champion("3", "another", there), "mine", mine)
    assert decision.promoted == promoted
    assert re.search(reason, decision.reason)


def test_the_same_model_stays_the_champion_under_its_newest_number():
    assert against(Champion("3", "mine", HALF), "mine", HALF).promoted


def test_a_score_is_read_as_it_was_written():
    third = Score(1 / 3, "store-1", "rows-1")
    assert Score.of(third.tags()) == Score.of(third.facts()) == third
    assert Score.of({"digest": "d"}) is None


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> str:
    """One for all tests here: MLflow takes seconds to make its tables."""
    return f"sqlite:///{tmp_path_factory.mktemp('server')}/mlflow.db"


@pytest.fixture
def run(tmp_path, server):
    update = {"root": str(tmp_path), "tracking_uri": server}
    recipe = RECIPES["image-tiny"]().model_copy(update=update)
    with track(recipe, "train", "digest", str(tmp_path / "teacher")) as run:
        yield run


def trained(folder: Path, seed: int) -> tuple[str, str]:
    """Write a model there; returns its folder and digest."""
    weights = random_network(backbone(), seed).state_dict()
    return str(folder), save_model(str(folder), model_config(TEXTS), weights, "a card")


@pytest.fixture
def name(request) -> str:
    """Of a registered model of this test alone."""
    return f"{NAME}-{request.node.name}"


def champion(run, name: str) -> tuple[str, str]:
    """Number and digest of what the alias leads to."""
    found = named_version(run, name, CHAMPION)
    assert found is not None
    place = resolve_model(f"models:/{name}@{CHAMPION}", run.uri)
    return str(found.version), load_model(place)[2]


def test_the_alias_stays_until_a_better_model_comes(run, name, tmp_path, capsys):
    def enter(seed: int, loss: float, rule="better") -> str:
        product, digest = trained(tmp_path / "teacher", seed)
        score = Score(loss, "store-1", "rows-1")
        decision = decide(run, name, rule, digest, score)
        place = copy_beside(product, digest) if rule == "better" else product
        alias = CHAMPION if decision.promoted else None
        number = register_model(run, name, place, digest, alias, score.tags())
        decision.say(run, name, number)
        return digest

    assert named_version(run, name, CHAMPION) is None
    first = enter(1, 0.5)
    assert champion(run, name) == ("1", first)
    worse = enter(2, 0.75)
    assert champion(run, name) == ("1", first)  # also its folder, though another model was trained
    said = capsys.readouterr().out
    assert f"{name} version 1 is the champion: there was none" in said
    assert f"{name} version 2 does not become the champion: its validation loss is 0.75" in said
    *_, python, _, by_hand = shlex.split(said.splitlines()[-1].partition(" by hand: ")[2])
    assert python == "python"
    exec(by_hand)
    assert champion(run, name) == ("2", worse)
    better = enter(3, 0.25)
    assert champion(run, name) == ("3", better)
    newest = enter(4, 9.0, rule="always")
    assert champion(run, name) == ("4", newest)


def test_a_champion_in_the_products_folder_moves_before_it_is_written_again(run, name, tmp_path):
    product, digest = trained(tmp_path / "teacher", 1)
    register_model(run, name, product, digest, CHAMPION, HALF.tags())
    Path(product, "record.json").write_text("{}")  # what makes a folder a stage's product
    save_champion(run, name, product)
    trained(tmp_path / "teacher", 2)
    assert champion(run, name) == ("2", digest)
    kept = Path(f"{product}-{digest}")
    assert resolve_model(f"models:/{name}@{CHAMPION}", run.uri) == str(kept)
    assert not (kept / "record.json").exists()
    found = named_version(run, name, CHAMPION)
    assert Score.of(found.tags) == HALF
    for _ in range(2):  # there is nothing left to move
        save_champion(run, name, product)
    assert named_version(run, name, CHAMPION).version == found.version


def test_a_folder_that_holds_another_model_is_not_taken_for_the_champion(run, name, tmp_path):
    product, digest = trained(tmp_path / "teacher", 1)
    register_model(run, name, product, digest, CHAMPION)
    trained(tmp_path / "teacher", 2)
    save_champion(run, name, product)
    assert named_version(run, name, CHAMPION).version in (1, "1")
    assert [path.name for path in tmp_path.glob("teacher*")] == ["teacher"]
