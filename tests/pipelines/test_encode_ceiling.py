"""How many rejects a job bears, and what those do that came before."""

import json
from pathlib import Path

import pytest
from picture_folder import picture, read_captions, write_captions
from six_pictures import COUNT, recipe
from test_encode_media import RATE, project, put_videos
from tiny_runs import encode_here

from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from pipelines import encode_ceiling, encode_rounds
from pipelines.encode_ceiling import Ceiling
from pipelines.encode_latents import encode
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options

__all__ = ["recipe"]


def test_a_broken_set_stops_the_job(recipe):
    folder = Path(recipe.data)
    names = [f"x{k}.png" for k in range(COUNT + 3)]
    for name in names:
        (folder / name).write_bytes(b"no picture")
    write_captions(folder, read_captions(folder) | dict.fromkeys(names, "x"))
    told = r"9 rejects among 15 rows are more than encode.max_reject_share 0\.5"
    with pytest.raises(UserError, match=told):
        encode_here(recipe)
    picture(70).save(folder / "new.png")
    write_captions(folder, read_captions(folder) | {"new.png": "new"})
    with pytest.raises(UserError, match=told.replace("15", "16")):
        encode_here(recipe)  # also where the rejects are those of an earlier run
    assert (
        "new.png" not in LatentStore(recipe.product("latents")).table("samples")["id"].to_pylist()
    )
    assert LatentStore(recipe.product("latents")).versions() == [1]
    tolerant = recipe.encode.model_copy(update={"max_reject_share": 0.6})
    record = encode_here(recipe.model_copy(update={"encode": tolerant}))
    assert (record.summary["samples"], record.summary["rejects"]) == (COUNT + 1, COUNT + 3)


@pytest.mark.parametrize(
    ("stored", "rows", "passed"), [(0, 12, 3), (0, 11, 2), (3, 12, 2), (7, 12, 0)]
)
def test_rejects_are_counted_with_the_stored_ones_against_rows(stored, rows, passed):
    """Three results of three rejects each, all but the last of them within the ceiling."""
    table = {"path": "", "bytes": 0, "rows": 3}
    parts = json.dumps([{"table": name, **table} for name in ("rejects", "samples")])
    seen: list[dict] = []
    ceiling = Ceiling(0.5, 0, stored)
    with pytest.raises(UserError, match=f"rejects among {rows} rows"):
        seen.extend(result for result in ceiling.over(rows, [{"parts": parts}] * 3))
    assert len(seen) == passed


def results(*counts: tuple[str, int]) -> list[dict]:
    """A result for each table and number of rows."""
    return [
        {"parts": json.dumps([{"table": table, "path": "", "bytes": 0, "rows": rows}])}
        for table, rows in counts
    ]


def test_a_set_that_is_broken_throughout_is_given_up_soon():
    made = results(("samples", 50), *[("rejects", 50)] * 100)
    seen: list[dict] = []
    with pytest.raises(UserError, match="950 rejects among the first 1000 rows"):
        seen.extend(result for result in Ceiling(0.5, 0, 0).over(10**6, made))
    assert len(seen) == 20


def test_what_was_known_to_be_rejects_tells_nothing_of_the_others():
    refused = results(*[("rejects", 500)] * 4)
    made = results(*[("samples", 60), ("rejects", 60)] * 20)
    assert list(Ceiling(0.5, 0, 0).over(10**6, made, refused)) == refused + made


def test_files_that_cannot_be_looked_into_are_given_up_soon(recipe, monkeypatch):
    """And what is known of them stays."""
    monkeypatch.setattr(encode_ceiling, "FIRST", COUNT + 3)
    folder = Path(recipe.data)
    names = [f"x{k}.png" for k in range(60)]
    for name in names:
        (folder / name).write_bytes(b"no picture")
    write_captions(folder, read_captions(folder) | dict.fromkeys(names, "x"))
    shapes = recipe.encode.model_copy(update={"max_aspect": 2.0})
    with pytest.raises(UserError, match="7 rejects among the first 13 rows"):
        encode_here(recipe.model_copy(update={"encode": shapes}))
    store = LatentStore(recipe.product("latents"))
    assert sorted(store.table("rejects")["id"].to_pylist()) == sorted(names)[:7]
    assert store.versions() == [1]


def folder_of(place: Path, broken: range, count: int, **settings: object) -> Recipe:
    """A project of so many pictures, some of which are none."""
    data = place / "data"
    data.mkdir()
    names = [f"{k:03d}.png" for k in range(count)]
    for k, name in enumerate(names):
        picture(k).save(data / name)
    for k in broken:
        (data / names[k]).write_bytes(b"no picture")
    write_captions(data, {name: name for name in names})
    return project(place, 16, upscale=True, shard_size=4, **settings)


def test_a_broken_set_is_told_why(tmp_path, capsys):
    with pytest.raises(UserError, match=r"9 rejects among 12 rows.* --retry-rejects"):
        encode_here(folder_of(tmp_path, range(3, 12), 12, max_aspect=1.0))
    assert "  003.png: not an image (begins with b'no picture'" in capsys.readouterr().out


def test_rejects_that_are_rejects_again_are_nothing_new(tmp_path, capsys):
    recipe = folder_of(tmp_path, range(4, 6), 8, max_aspect=1.0)
    first = encode_here(recipe)
    again = encode_here(recipe, Options(force=True, retry_rejects=True))
    told = capsys.readouterr().out
    assert "2 of 8 rejected: 2 not an image; `--retry-rejects` tries them again" in told
    assert "nothing new: version 1 stands" in told
    assert "2 of 8 still rejected: 2 not an image\n" in told
    assert (first.summary["version"], again.summary["version"]) == (1, 1)
    (tmp_path / "data/004.png").write_bytes(b"")  # for another reason, of as many files
    (tmp_path / "data/005.png").write_bytes(b"")
    assert encode_here(recipe, Options(force=True, retry_rejects=True)).summary["version"] == 2


def test_a_dry_run_tells_of_rejects_and_of_what_is_tried_again(tmp_path, capsys):
    recipe = folder_of(tmp_path, range(4, 6), 8, max_aspect=1.0)
    (tmp_path / "data/nocaption.png").write_bytes(b"")
    encode(recipe, Options(dry_run=True))
    told = capsys.readouterr().out
    assert "8 pictures, 0 videos, and 1 unusable (1 no caption)" in told
    assert "of 8 that are new or changed, in this process; 2 of them are rejects: 2 not" in told
    encode_here(recipe)
    encode(recipe, Options(force=True, dry_run=True, retry_rejects=True))
    assert "2 of 2 that are new or changed, in this process; 2 of them are rejects" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("max_aspect", [1.0, 2.0], ids=["listed", "looked into"])
def test_rejects_of_a_good_store_are_tried_again_however_many(tmp_path, monkeypatch, max_aspect):
    """And are rejects again: what is kept is most of the set."""
    recipe = folder_of(tmp_path, range(16, 24), 24, max_aspect=max_aspect)
    assert encode_here(recipe).summary["rejects"] == 8
    monkeypatch.setattr(encode_ceiling, "FIRST", 4)
    again = encode_here(recipe, Options(force=True, retry_rejects=True))
    assert (again.summary["samples"], again.summary["rejects"]) == (16, 8)


def test_a_broken_folder_in_the_middle_is_no_broken_set(tmp_path, monkeypatch):
    """Four files at the beginning of a round, of twenty-four."""
    monkeypatch.setattr(encode_rounds, "FIRST_FILES", 4)
    monkeypatch.setattr(encode_ceiling, "FIRST", 4)
    record = encode_here(folder_of(tmp_path, range(12, 16), 24, max_aspect=2.0))
    assert (record.summary["samples"], record.summary["rejects"]) == (20, 4)


def test_a_film_half_of_which_is_in_may_be_a_reject_today(tmp_path, monkeypatch):
    """Its clips go in the same run, which publishes."""
    (tmp_path / "data").mkdir()
    put_videos(tmp_path, film=48, other=32)
    recipe = project(tmp_path, 64, frames=8, fps=RATE, shard_size=1, max_reject_share=0.9)
    commit, left = LatentStore.commit, iter(range(8))

    def killed(store: LatentStore, table: str, *told: object) -> None:
        if table == "samples" and next(left, None) is None:
            raise KeyboardInterrupt
        commit(store, table, *told)

    monkeypatch.setattr(LatentStore, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        encode_here(recipe)
    monkeypatch.setattr(LatentStore, "commit", commit)
    store = LatentStore(recipe.product("latents"))
    assert 0 < store.dataset("samples").count_rows() < 10
    slow = recipe.encode.model_copy(update={"item_seconds": 1e-6})
    record = encode_here(recipe.model_copy(update={"encode": slow}))
    whole = store.table("samples")["source_id"].to_pylist()
    assert record.summary["rejects_by_reason"] == {"timeout": 2 - len(set(whole))}
    assert len(whole) in (0, 4, 6)
