"""CLIP's tokens, two CLIPs' and other text encoders in the store, with workers in this process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folder import picture, write_captions
from test_encode_media import project
from test_encode_options import made
from text_models import text_model

from ldm_core.errors import UserError
from ldm_core.latents.codec import decode_embedding
from ldm_core.latents.reader import LatentReader
from ldm_core.latents.store import StoreVersion
from ldm_core.text.encoders import clip_digest, load_clip, t5_digest
from ldm_core.text.tiny import build_tiny_text_encoders
from ldm_core.text.token_encoders import load_tokens
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.recipes.schema import Recipe

CAPTIONS = ["a red cat", "a dog", "two blue cats"]
HALF = {"rtol": 1e-3, "atol": 1e-3}  # 16-bit storage


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    data = tmp_path / "data"
    data.mkdir()
    for k in range(len(CAPTIONS)):
        picture(k).save(data / f"{k}.png")
    write_captions(data, {f"{k}.png": caption for k, caption in enumerate(CAPTIONS)})
    for width, name in ((8, "small"), (16, "large")):
        places = (str(tmp_path / f"t5 {name}"), str(tmp_path / f"clip {name}"))
        build_tiny_text_encoders(CAPTIONS, *places, width, seed=width)
    places = {"t5": f"{tmp_path}/t5 small", "clip": f"{tmp_path}/clip small"}
    return with_text(project(tmp_path, 16, max_aspect=1, upscale=True), **places)


def with_text(recipe: Recipe, **update: object) -> Recipe:
    return recipe.model_copy(update={"text": recipe.text.model_copy(update=update)})


def rows_of(version: StoreVersion, encoder: str) -> dict[str, dict]:
    rows = version.table("texts").to_pylist()
    return {row["caption"]: row for row in rows if row["encoder"] == encoder}


def tokens_of(row: dict) -> torch.Tensor:
    data = decode_embedding(row["tokens"], row["tokens_shape"], row["dtype"])
    return torch.from_numpy(data.copy()).float()


def vector_of(row: dict) -> torch.Tensor:
    data = decode_embedding(row["pooled"], (1, row["pooled_size"]), row["dtype"])
    return torch.from_numpy(data.copy()).float()[0]


def digests(version: StoreVersion) -> dict[str, str]:
    return {entry.name: entry.digest for entry in version.manifest.texts}


def conditions(version: StoreVersion) -> list[torch.Tensor]:
    found = LatentReader(version).batch(np.arange(3), np.zeros(3, int), 0).condition
    return [found.tokens, found.pooled]


class TestClipTokens:
    def test_lie_beside_the_vector_where_they_are_asked_for(self, recipe):
        clip = load_clip(recipe.text.clip, tokens=True)
        without = made(recipe)
        assert all(row["tokens"] is None for row in rows_of(without, "clip").values())
        version = made(with_text(recipe, clip_tokens=True))
        rows, before = rows_of(version, "clip"), rows_of(without, "clip")
        assert set(rows) == {*CAPTIONS, ""}
        for caption, embedding in zip(rows, clip.encode(list(rows)), strict=True):
            torch.testing.assert_close(tokens_of(rows[caption]), embedding.tokens, **HALF)
            assert rows[caption]["tokens_shape"] == [len(caption.split()) + 2, 8]
            assert rows[caption]["pooled"] == before[caption]["pooled"]
        assert rows_of(version, "t5") == rows_of(without, "t5")  # nothing of it was done again
        assert all(map(torch.equal, conditions(version), conditions(without)))

    def test_a_store_without_them_has_the_digests_it_always_had(self, recipe):
        text = recipe.text
        known = {"t5": t5_digest(text.t5, text.max_tokens), "clip": clip_digest(text.clip)}
        without = made(recipe)
        assert digests(without) == known
        version = made(with_text(recipe, clip_tokens=True))
        assert digests(version) == {**known, "clip": f"{known['clip']}-tokens"}
        assert version.manifest.content != without.manifest.content
        again = made(recipe)
        assert (again.manifest.content, digests(again)) == (without.manifest.content, known)

    def test_in_eight_bits(self, recipe):
        small = recipe.encode.model_copy(update={"text_dtype": "int8-b16"})
        recipe = with_text(recipe.model_copy(update={"encode": small}), clip_tokens=True)
        version = made(recipe)
        assert digests(version)["clip"].endswith("-tokens-int8-b16")
        assert set(version.manifest.rounding) == {"t5", "clip"}
        clip = load_clip(recipe.text.clip, tokens=True)
        rows = rows_of(version, "clip")
        for caption, embedding in zip(rows, clip.encode(list(rows)), strict=True):
            error = (tokens_of(rows[caption]) - embedding.tokens).norm()
            assert 0 < error < 0.016 * embedding.tokens.norm()
            both = (tokens_of, embedding.tokens), (vector_of, embedding.pooled)
            errors = [(read(rows[caption]) - x).norm() / x.norm() for read, x in both]
            assert rows[caption]["relative_error"] == pytest.approx(float(max(errors)), rel=0.05)
        tokens, pooled = conditions(version)
        assert (tokens.shape[2], pooled.shape[1]) == (8, 8)

    def test_of_two_clips_lie_side_by_side(self, recipe, tmp_path):
        both = f"{recipe.text.clip} + {tmp_path}/clip large"
        version = made(with_text(recipe, clip=both, clip_tokens=True))
        row = rows_of(version, "clip")["a red cat"]
        assert (row["tokens_shape"], row["pooled_size"]) == ([5, 8 + 16], 8 + 16)
        [large] = load_clip(f"{tmp_path}/clip large", tokens=True).encode(["a red cat"])
        torch.testing.assert_close(tokens_of(row)[:, 8:], large.tokens, **HALF)

    def test_shards_of_captions_have_room_for_them(self, recipe):
        def room(recipe: Recipe) -> dict[str, int]:
            return dict(make_plan(recipe, describe_autoencoder(recipe)).token_bytes)

        assert room(recipe) == {"t5": 2 * 128 * 8}
        assert room(with_text(recipe, clip_tokens=True)) == {"t5": 2 * 128 * 8, "clip": 2 * 77 * 8}


class TestTokensOfOtherEncoders:
    @pytest.mark.parametrize("kind", ["bert", "qwen2"])
    def test_are_what_training_reads(self, recipe, tmp_path, kind):
        uri = str(text_model(tmp_path / kind, kind))
        version = made(with_text(recipe, t5=uri))
        encoder = load_tokens(uri)
        assert digests(version)["t5"] == encoder.digest
        tokens, _ = conditions(version)
        for row, expected in zip(tokens, encoder.encode(CAPTIONS), strict=True):
            torch.testing.assert_close(row[: len(expected.tokens)], expected.tokens, **HALF)
            assert not row[len(expected.tokens) :].any()

    def test_clip_may_be_the_only_encoder(self, recipe):
        version = made(with_text(recipe, t5=recipe.text.clip))
        tokens, pooled = conditions(version)
        encoded = load_clip(recipe.text.clip, tokens=True).encode(CAPTIONS)
        for row, vector, expected in zip(tokens, pooled, encoded, strict=True):
            torch.testing.assert_close(row[: len(expected.tokens)], expected.tokens, **HALF)
            torch.testing.assert_close(vector, expected.pooled, **HALF)

    def test_two_clips_may_by_relative_paths(self, recipe, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        both = "clip small + clip large"
        version = made(with_text(recipe, t5=both, clip=both))
        told = {entry.name: entry.uri for entry in version.manifest.texts}
        assert told["t5"] == told["clip"] == f"{tmp_path}/clip small + {tmp_path}/clip large"
        assert [each.shape[-1] for each in conditions(version)] == [24, 24]

    def test_what_only_sees_is_refused_before_anything_starts(self, recipe, tmp_path):
        folder = text_model(tmp_path / "vit", "vit")
        with pytest.raises(UserError, match=f"{folder} holds no text model"):
            make_plan(with_text(recipe, t5=str(folder)), describe_autoencoder(recipe))
