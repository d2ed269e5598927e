"""Mirrored copies, tiles and bfloat16 of the encode stage, with its workers in this process."""

from pathlib import Path

import pytest
import torch
from picture_folder import picture, write_captions
from test_encode_media import latents_of, project, put_videos, saved, tiny_kl
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.errors import UserError
from ldm_core.latents.schema import decode_array
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.verify import verify
from ldm_core.text.encoders import load_clip
from ldm_core.text.tiny import build_tiny_text_encoders
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TextSection

COUNT = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


def put_pictures(folder: Path) -> None:
    for k in range(COUNT):
        picture(k).resize((96, 64)).save(folder / "data" / f"{k}.png")
    write_captions(folder / "data", {f"{k}.png": f"picture {k}" for k in range(COUNT)})


def with_encode(recipe: Recipe, **update: object) -> Recipe:
    return recipe.model_copy(update={"encode": recipe.encode.model_copy(update=update)})


def made(recipe: Recipe) -> StoreVersion:
    encode_here(recipe)
    version = LatentStore(recipe.product("latents")).open_version()
    facts = autoencoder_facts(recipe.autoencoder.source)
    assert [check for check in verify(version, facts) if check.failed] == []
    return version


def rows_of(version: StoreVersion) -> dict[str, dict]:
    return {row["id"]: row for row in version.table("samples").to_pylist()}


class TestMirrored:
    def test_every_picture_has_a_second_row_that_is_its_mirror_image(self, folder):
        put_pictures(folder)
        recipe = project(folder, 32, flip=True, shard_size=3)
        rows = rows_of(made(recipe))
        assert len(rows) == 2 * COUNT
        for k in range(COUNT):
            one, other = rows[f"{k}.png"], rows[f"{k}.png#mirrored"]
            assert (one["part"], other["part"], one["parts"], other["parts"]) == (0, 1, 2, 2)
            assert one["captions"] == other["captions"]
            assert torch.equal(latents_of(other)[0], latents_of(one)[0].flip(-1))
        assert encode_here(recipe).summary["version"] == 1  # nothing new

    def test_every_clip_too(self, folder):
        put_videos(folder, a=20)
        rows = rows_of(made(project(folder, 32, frames=9, fps=8, flip=True)))
        ids = [id for id in rows if not id.endswith("#mirrored")]
        assert len(rows) == 2 * len(ids) == 2 * 3
        assert {(row["part"], row["parts"]) for row in rows.values()} == {(k, 6) for k in range(6)}
        for id in ids:
            assert rows[f"{id}#mirrored"]["start_s"] == rows[id]["start_s"]
            mirrored = latents_of(rows[f"{id}#mirrored"])[0]
            assert torch.equal(mirrored, latents_of(rows[id])[0].flip(-1))

    def test_whatever_clips_a_shard_begins_with(self, folder):
        """The second has a clip of the second video before the mirror image of an earlier one."""
        put_videos(folder, a=18, b=18)
        rows = rows_of(made(project(folder, 32, frames=9, fps=8, flip=True, shard_size=5)))
        assert len(rows) == 2 * 2 * 2
        for id in rows.keys() - {id for id in rows if id.endswith("#mirrored")}:
            mirrored = latents_of(rows[f"{id}#mirrored"])[0]
            assert torch.equal(mirrored, latents_of(rows[id])[0].flip(-1))

    @pytest.mark.parametrize("max_aspect", [1, 2])  # found out by listing, or by probing
    def test_a_bad_file_is_all_rejects(self, folder, max_aspect):
        put_pictures(folder)
        data = (folder / "data" / "2.png").read_bytes()
        (folder / "data" / "2.png").write_bytes(data[: len(data) // 2])
        version = made(project(folder, 32, flip=True, max_aspect=max_aspect, upscale=True))
        assert version.manifest.counts["samples"] == 2 * (COUNT - 1)
        rejects = version.table("rejects").to_pylist()
        assert {row["source_id"] for row in rejects} == {"2.png"}
        assert len(rejects) == rejects[0]["parts"]

    def test_they_come_and_go_with_the_setting(self, folder):
        put_pictures(folder)
        recipe = project(folder, 32)
        without = made(recipe).manifest
        with_them = made(with_encode(recipe, flip=True)).manifest
        assert (with_them.counts["samples"], with_them.encoding) == (2 * COUNT, {"flip": True})
        again = made(recipe).manifest
        assert (again.content, again.encoding) == (without.content, {})


class TestTiles:
    @pytest.fixture
    def recipe(self, folder) -> Recipe:
        put_pictures(folder)
        return project(folder, 64, saved(tiny_kl(), folder / "kl"), max_aspect=1)

    def test_what_is_larger_is_tiled_and_encoded_again_when_that_changes(self, recipe):
        whole = made(recipe)
        tiled = made(with_encode(recipe, tile=32))
        assert tiled.manifest.encoding == {"tile": 32}
        assert "- encoded with tile: 32\n" in Path(tiled.store.uri, "README.md").read_text()
        for id, row in rows_of(whole).items():
            (expected, _), (found, _) = latents_of(row), latents_of(rows_of(tiled)[id])
            assert found.shape == expected.shape
            assert 0 < (found - expected).abs().mean() < 0.25 * expected.std()
        assert made(with_encode(recipe, tile=64)).manifest.content == whole.manifest.content

    def test_a_tile_that_does_not_fit_is_refused_before_anything_starts(self, recipe):
        with pytest.raises(UserError, match=r"encode\.tile is 20, no multiple of 8"):
            encode_here(with_encode(recipe, tile=20))


def test_bfloat16_is_near_and_is_said(folder):
    put_pictures(folder)
    recipe = project(folder, 32, saved(tiny_kl(), folder / "kl"), max_aspect=1)
    exact = made(recipe)
    near = made(with_encode(recipe, precision="bf16"))
    assert near.manifest.encoding == {"precision": "bf16"}
    for id, row in rows_of(exact).items():
        (expected, _), (found, _) = latents_of(row), latents_of(rows_of(near)[id])
        assert 0 < (found - expected).norm() < 0.03 * expected.norm()
    assert made(recipe).manifest.content == exact.manifest.content


def test_two_clips_side_by_side(folder, monkeypatch):
    """By relative paths, as a user writes them."""
    put_pictures(folder)
    words = [f"picture {k}" for k in range(COUNT)]
    for width, name in ((8, "small"), (16, "large")):
        places = (str(folder / f"t5 {name}"), str(folder / f"clip {name}"))
        build_tiny_text_encoders(words, *places, width, seed=width)
    monkeypatch.chdir(folder)
    recipe = project(folder, 32)
    text = TextSection(tiny_width=8, clip="clip small + clip large")
    version = made(recipe.model_copy(update={"text": text}))
    [told] = [entry.uri for entry in version.manifest.texts if entry.name == "clip"]
    assert told == f"{folder}/clip small + {folder}/clip large"
    rows = [row for row in version.table("texts").to_pylist() if row["encoder"] == "clip"]
    assert {row["pooled_size"] for row in rows} == {8 + 16}
    small = load_clip(str(folder / "clip small")).encode(["picture 0"])[0].pooled
    stored = next(row["pooled"] for row in rows if row["caption"] == "picture 0")
    kept = torch.from_numpy(decode_array(stored, (24,)).copy()).float()
    torch.testing.assert_close(kept[:8], small, rtol=1e-3, atol=1e-3)
