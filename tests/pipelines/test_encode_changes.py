"""What a second run does: as little as the change asks for. Workers are in this process."""

import re
from pathlib import Path

import pytest
from picture_folder import picture, read_captions, write_captions
from six_pictures import COUNT, newest, recipe
from test_encode_media import saved, tiny_kl
from tiny_runs import encode_here

from ldm_core.errors import UserError
from ldm_core.latents.card import store_card
from ldm_core.latents.lock import locked
from ldm_core.latents.store import LatentStore, StoreVersion
from pipelines import encode_latents
from pipelines.encode_captions import EncodeTexts
from pipelines.encode_latents import encode
from pipelines.encode_workers import EncodeMedia
from pipelines.recipes.sections import AutoencoderSection
from pipelines.stage import Options

__all__ = ["recipe"]


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
