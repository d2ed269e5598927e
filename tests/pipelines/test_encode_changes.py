"""What a second run does: as little as the change asks for. Workers are in this process."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from picture_folder import picture, read_captions, write_captions
from PIL import Image
from test_encode_media import project, saved, tiny_kl
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.errors import UserError
from ldm_core.latents.card import store_card
from ldm_core.latents.lock import locked
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.verify import verify
from pipelines import encode_latents
from pipelines.encode_captions import EncodeTexts
from pipelines.encode_latents import _check_tables, encode
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.encode_texts import text_shards
from pipelines.encode_workers import EncodeMedia
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection
from pipelines.stage import Options

COUNT = 6


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Six pictures, encoded once."""
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(COUNT):
        picture(k).save(folder / f"{k}.png")
    write_captions(folder, {f"{k}.png": f"picture {k}" for k in range(COUNT)})
    recipe = project(tmp_path, 16, max_aspect=1, upscale=True)
    encode_here(recipe)
    return recipe


@pytest.fixture
def calls(recipe, monkeypatch) -> dict[str, int]:
    """How many pictures and captions are encoded from now on."""
    counts = {"pictures": 0, "captions": 0}
    encode, embed = EncodeMedia._encode, EncodeTexts._row

    def count_pictures(self, items, pixels):
        counts["pictures"] += len(items)
        return encode(self, items, pixels)

    def count_captions(self, *args):
        counts["captions"] += 1
        return embed(self, *args)

    monkeypatch.setattr(EncodeMedia, "_encode", count_pictures)
    monkeypatch.setattr(EncodeTexts, "_row", count_captions)
    return counts


def newest(recipe: Recipe) -> StoreVersion:
    return LatentStore(recipe.product("latents")).open_version()


def rows_of(version: StoreVersion) -> dict[str, dict]:
    return {row["id"]: row for row in version.table("samples").to_pylist()}


def test_a_new_caption_is_embedded_and_no_picture_encoded(recipe, calls):
    before = newest(recipe)
    folder = Path(recipe.data)
    write_captions(folder, read_captions(folder) | {"3.png": "a new caption"})
    record = encode_here(recipe)
    assert calls == {"pictures": 0, "captions": 2}
    assert (record.summary["renamed_rows"], record.summary["new_rows"]) == (1, 0)
    old, new = rows_of(before), rows_of(newest(recipe))
    assert new["3.png"]["captions"][0]["caption"] == "a new caption"
    assert new["3.png"]["latent_mean"] == old["3.png"]["latent_mean"]
    assert {id for id in old if old[id] != new[id]} == {"3.png"}
    assert newest(recipe).manifest.content != before.manifest.content
    assert "picture 3" not in newest(recipe).table("texts")["caption"].to_pylist()


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


def test_the_content_is_that_of_a_run_from_scratch(recipe, calls, tmp_path):
    folder = Path(recipe.data)
    write_captions(folder, read_captions(folder) | {"3.png": "a new caption"})
    (folder / "0.png").unlink()
    write_captions(folder, {k: v for k, v in read_captions(folder).items() if k != "0.png"})
    picture(70).save(folder / "1.png")
    encode_here(recipe)
    assert calls["pictures"] == 1
    fresh = recipe.model_copy(update={"root": str(tmp_path / "fresh")})
    text = recipe.text.model_copy(update={"t5": recipe.t5_uri, "clip": recipe.clip_uri})
    encode_here(fresh.model_copy(update={"text": text}))
    assert newest(fresh).manifest.content == newest(recipe).manifest.content


def test_another_autoencoder_encodes_pictures_and_no_caption(recipe, calls, tmp_path):
    source = saved(tiny_kl(), tmp_path / "kl")
    encode_here(recipe.model_copy(update={"autoencoder": AutoencoderSection(source=source)}))
    assert calls == {"pictures": COUNT, "captions": 0}


def test_another_text_encoder_embeds_captions_and_encodes_no_picture(recipe, calls):
    shorter = recipe.text.model_copy(update={"max_tokens": 3})
    encode_here(recipe.model_copy(update={"text": shorter}))
    assert calls == {"pictures": 0, "captions": 2 * (COUNT + 1)}


def test_a_removed_file_leaves_the_next_version_and_stays_in_the_last(recipe, calls):
    folder = Path(recipe.data)
    (folder / "2.png").unlink()
    write_captions(folder, {k: v for k, v in read_captions(folder).items() if k != "2.png"})
    encode_here(recipe)
    assert calls == {"pictures": 0, "captions": 0}
    store = LatentStore(recipe.product("latents"))
    assert "2.png" not in rows_of(store.open_version(2))
    assert "2.png" in rows_of(store.open_version(1))
    assert "picture 2" not in store.open_version(2).table("texts")["caption"].to_pylist()


def test_rejects_are_tried_again_when_asked(recipe, calls, monkeypatch):
    folder = Path(recipe.data)
    picture(8).save(folder / "8.png")
    write_captions(folder, read_captions(folder) | {"8.png": "picture 8"})

    impatient = recipe.encode.model_copy(update={"item_seconds": 1e-6})
    record = encode_here(recipe.model_copy(update={"encode": impatient}))
    assert record.summary["rejects_by_reason"] == {"timeout": 1}
    encode_here(recipe, Options(force=True))
    assert newest(recipe).manifest.rejects == {"timeout": 1}  # a reject stays one unasked
    record = encode_here(recipe, Options(force=True, retry_rejects=True))
    assert (record.summary["samples"], record.summary["rejects"]) == (COUNT + 1, 0)
    assert calls["pictures"] == 1


def test_repeated_files_are_told(recipe, capsys):
    folder = Path(recipe.data)
    (folder / "copy.png").write_bytes((folder / "4.png").read_bytes())
    write_captions(folder, read_captions(folder) | {"copy.png": "picture 4"})
    assert encode_here(recipe).summary["duplicates"] == 1
    assert "duplicates: 1 with the bytes of another file; most" in capsys.readouterr().out
    assert duplicates(recipe) == [{"same": "bytes", "files": ["4.png", "copy.png"]}]
    picture(70).save(folder / "copy.png")
    encode_here(recipe)
    assert duplicates(recipe) == []


def duplicates(recipe: Recipe) -> list[dict]:
    return [*map(json.loads, Path(recipe.product("latents"), "duplicates.jsonl").open())]


def test_groups_of_duplicates_are_listed_in_full_the_largest_first(recipe):
    folder, captions = Path(recipe.data), read_captions(Path(recipe.data))
    for name, source in {"a": 1, "b": 4, "c": 4}.items():
        (folder / f"{name}.png").write_bytes((folder / f"{source}.png").read_bytes())
    picture(4).save(folder / "d.png", compress_level=1)
    write_captions(folder, captions | dict.fromkeys(["a.png", "b.png", "c.png", "d.png"], "x"))
    assert encode_here(recipe).summary["duplicates"] == 3
    assert duplicates(recipe) == [
        {"same": "bytes", "files": ["4.png", "b.png", "c.png"]},
        {"same": "bytes", "files": ["1.png", "a.png"]},
        {"same": "dHash", "files": ["4.png", "b.png", "c.png", "d.png"]},
    ]


@pytest.mark.parametrize("left", ["the card of version 1", "none"])
def test_a_card_that_a_kill_prevented_is_written_by_the_next_run(recipe, monkeypatch, left):
    card = Path(recipe.product("latents"), "README.md")
    picture(8).save(Path(recipe.data) / "8.png")
    write_captions(Path(recipe.data), read_captions(Path(recipe.data)) | {"8.png": "x"})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_latents, "write_card", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_here(recipe)
    assert newest(recipe).number == 2
    assert "This card describes version 1 of" in card.read_text()
    if left == "none":
        card.unlink()
    encode_here(recipe)
    assert newest(recipe).number == 2
    assert card.read_text() == store_card(newest(recipe).manifest)


def test_pictures_that_only_look_alike_are_told(recipe, capsys):
    """One picture as JPEG of three qualities and a little smaller: no two have the same pixels."""
    folder = Path(recipe.data)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    photo = coarse.resize((320, 320), Image.Resampling.BICUBIC)
    for quality in (95, 75, 40):
        photo.save(folder / f"photo-{quality}.jpg", quality=quality)
    photo.resize((288, 288), Image.Resampling.LANCZOS).save(folder / "smaller.png")
    names = [*(f"photo-{quality}.jpg" for quality in (40, 75, 95)), "smaller.png"]
    write_captions(folder, read_captions(folder) | dict.fromkeys(names, "a photo"))
    assert encode_here(recipe).summary["duplicates"] == 0
    assert duplicates(recipe) == [{"same": "dHash", "files": names}]
    rows = newest(recipe).table("samples", ["source_id", "perceptual_hash"]).to_pylist()
    assert len({row["perceptual_hash"] for row in rows if row["source_id"] in names}) > 1
    told = "duplicates: 3 that look like another; most often, 4 times"
    assert f"{told}: photo-40.jpg, photo-75.jpg, photo-95.jpg" in capsys.readouterr().out


def test_a_second_job_is_refused_before_it_writes(recipe):
    picture(8).save(Path(recipe.data) / "8.png")
    write_captions(Path(recipe.data), read_captions(Path(recipe.data)) | {"8.png": "x"})
    before = newest(recipe).store.open("samples").version()
    with (
        locked(recipe.product("latents")),
        pytest.raises(UserError, match="is being written by process"),
    ):
        encode_here(recipe)
    assert newest(recipe).store.open("samples").version() == before
    assert encode_here(recipe).summary["samples"] == COUNT + 1


def test_a_dry_run_tells_what_all_would_take(recipe, tmp_path, capsys):
    """The store's growth is foretold from a twentieth of the files."""
    folder, names = Path(recipe.data), [f"n{k}.png" for k in range(640)]
    for k, name in enumerate(names):
        picture(100 + k).save(folder / name)
    captions = {name: f"the new picture {k}" for k, name in enumerate(names)}
    write_captions(folder, read_captions(folder) | captions)
    before = newest(recipe).manifest.bytes
    files = sorted(tmp_path.rglob("root/latents/**/*"))
    priced = recipe.encode.model_copy(update={"worker_hour_price": 2.0, "shard_size": 32})
    mine = recipe.model_copy(update={"encode": priced})
    assert encode(mine, Options(dry_run=True)) is None
    printed = capsys.readouterr().out
    assert "at 2 each" in printed
    assert "32 of 640 that are new or changed, in this process" in printed
    assert files == sorted(tmp_path.rglob("root/latents/**/*"))
    foretold = int(re.search(r"bytes +([\d,]+) for 640 samples", printed)[1].replace(",", ""))
    grown = encode_here(mine).summary["bytes"] - before
    assert foretold == pytest.approx(grown, rel=0.2)
