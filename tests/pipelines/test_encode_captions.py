"""Captions of a latent store: in which order they lie, how they are cut, and each of them once."""

import json
from dataclasses import replace

import pytest
from picture_folder import picture, write_captions
from six_pictures import COUNT, newest, recipe
from test_encode_media import project
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from ldm_core.latents.verify import verify
from pipelines.encode_latents import _check_tables
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.encode_texts import text_shards
from pipelines.recipes.schema import Recipe
from pipelines.stage import Options

__all__ = ["recipe"]


def test_weights_of_all_kinds_are_verified(tmp_path):
    """They are stored in 32 bits, which moves some of them to another sixth place."""
    (tmp_path / "data").mkdir()
    rows = []
    for k, weights in enumerate([(27, 2), (1, 2), (1, 1, 1), (0.1, 0.7), (8, 21)]):
        picture(k).save(tmp_path / "data" / f"{k}.png")
        captions = [f"caption {k} {n}" for n in range(len(weights))]
        rows.append({"file": f"{k}.png", "captions": captions, "weights": weights})
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "data" / "captions.jsonl").write_text(lines)
    recipe = project(tmp_path, 16, max_aspect=1, upscale=True)
    encode_here(recipe)
    checks = verify(newest(recipe), autoencoder_facts("identity"))
    assert [check for check in checks if check.failed] == []
    assert encode_here(recipe, Options(force=True)).summary["renamed_rows"] == 0


def test_captions_lie_in_the_order_of_their_samples(recipe):
    store = LatentStore(recipe.product("latents"))
    told = store.table("texts", columns=["encoder", "caption"]).to_pylist()
    for encoder in ("t5", "clip"):
        captions = [row["caption"] for row in told if row["encoder"] == encoder]
        assert captions == ["", *(f"picture {k}" for k in range(COUNT))]


def test_texts_of_a_run_that_goes_on_are_cut_as_an_undisturbed_runs(tmp_path, monkeypatch):
    """Samples lie by bucket, so that their order is not that of the files' names."""
    folder, sides = tmp_path / "data", ((64, 32), (32, 32))
    folder.mkdir()
    for k in range(8):
        picture(k).resize(sides[k % 2]).save(folder / f"{k}.png")
    write_captions(folder, {f"{k}.png": f"picture {k}" for k in range(8)})
    calm = project(tmp_path, 32, max_aspect=2, upscale=True, shard_size=2)
    encode_here(calm)
    text = calm.text.model_copy(update={"t5": calm.t5_uri, "clip": calm.clip_uri})
    mine = calm.model_copy(update={"root": str(tmp_path / "broken off"), "text": text})
    commit, left = LatentStore.commit, [2]

    def commit_half(self, table, *args):
        left[0] -= 1
        if left[0] == -1:
            raise KeyboardInterrupt
        commit(self, table, *args)

    monkeypatch.setattr(LatentStore, "commit", commit_half)
    with pytest.raises(KeyboardInterrupt):
        encode_here(mine)
    assert LatentStore(mine.product("latents")).table("samples").num_rows == 4
    assert encode_here(mine).summary["new_rows"] == 4

    def texts(recipe: Recipe) -> list[tuple[str, str]]:
        rows = newest(recipe).table("texts", ["shard", "caption"]).to_pylist()
        return sorted((row["shard"], row["caption"]) for row in rows)

    assert len(newest(calm).manifest.buckets) == 2
    assert texts(mine) == texts(calm)


def test_captions_are_cut_so_that_their_tokens_have_room(recipe):
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    assert plan.token_bytes == {"t5": 2 * recipe.text.max_tokens * recipe.text.tiny_width}
    wide = replace(plan, token_bytes={"t5": 2**20 // 3})
    section = recipe.encode.model_copy(update={"shard_mib": 1})
    rows = list(text_shards(wide, sorted(plan.text_rows()), section))
    sizes = [(row["encoder"], len(json.loads(row["items"]))) for row in rows]
    assert sizes == [("t5", 3), ("t5", 3), ("t5", 1), ("clip", COUNT + 1)]
    wider = replace(plan, token_bytes={"t5": 2**30})
    assert len(list(text_shards(wider, sorted(plan.text_rows()), section))) == COUNT + 2


def test_captions_that_are_embedded_twice_are_not_published(recipe):
    """As by another program that does not heed the lock."""
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    store = LatentStore(plan.job.store)
    store.commit("texts", [store.write_part("texts", store.table("texts"), "again")], "again")
    with pytest.raises(UserError, match="0 files and 14 caption embeddings missing, 14 rows that"):
        _check_tables(plan, store)
    assert encode_here(recipe, Options(force=True)).summary["texts"] == 2 * (COUNT + 1)
