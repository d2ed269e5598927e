import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import CAPTIONS, WIDTH, hidden_states, text_model, tokenizer_of
from transformers import AutoModel, AutoTokenizer

from ldm_core.errors import UserError
from ldm_core.text.any_encoder import describe_any, load_any

ENCODERS, DECODERS = ["bert", "modernbert"], ["llama", "qwen2", "gemma2"]
READERS = {  # where the part that reads text is, of models with others
    "bart": lambda model: model.encoder,
    "siglip": lambda model: model.text_model,
    "gemma3": lambda model: model.language_model,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, in products of other shapes


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    kinds = (*ENCODERS, *DECODERS, *READERS)
    return {kind: str(text_model(root / kind, kind)) for kind in kinds}


def whole(folder: str) -> tuple[torch.nn.Module, object]:
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS, *READERS])
def test_captions_of_a_batch_are_what_each_is_alone_and_unpadded(folders, kind):
    model, tokenizer = whole(folders[kind])
    reader = READERS.get(kind, lambda model: model)(model)
    captions = [text for text in CAPTIONS if tokenizer(text)["input_ids"]]
    assert len(captions) >= len(CAPTIONS) - (kind == "qwen2")
    encoder = load_any(folders[kind])
    expected = hidden_states(reader, tokenizer, captions)
    for found, tokens in zip(encoder.encode(captions), expected, strict=True):
        torch.testing.assert_close(found.tokens, tokens, **CLOSE)
        assert found.pooled is None
        assert found.tokens.dtype == torch.float32
    assert (encoder.name, encoder.width, encoder.max_tokens) == ("t5", WIDTH, 64)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gemma2", "qwen2"])
def test_neither_company_nor_order_matters(folders, kind):
    encoder = load_any(folders[kind])
    among = encoder.encode(CAPTIONS)
    turned = encoder.encode(CAPTIONS[::-1])[::-1]
    for caption, one, other in zip(CAPTIONS, among, turned, strict=True):
        [alone] = encoder.encode([caption])
        torch.testing.assert_close(one.tokens, other.tokens, **CLOSE)
        torch.testing.assert_close(one.tokens, alone.tokens, **CLOSE)


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_are_taken_after_their_final_norm(folders, kind):
    """Whose weights are one: every token has a mean square of one."""
    tokens = torch.cat([each.tokens for each in load_any(folders[kind]).encode(CAPTIONS)])
    torch.testing.assert_close(tokens.square().mean(1), torch.ones(len(tokens)), **CLOSE)


def test_words_see_what_they_may(folders):
    """BERT's all others, a decoder's those before."""
    captions = ["a red cat", "a red dog"]
    for kind, seen in (("bert", True), ("llama", False)):
        one, other = (each.tokens for each in load_any(folders[kind]).encode(captions))
        assert ((one[:3] - other[:3]).abs().max() > 1e-3) == seen
        assert (one[3] - other[3]).abs().max() > 1e-3


def test_a_tokenizer_that_pads_and_cuts_on_the_left_or_has_nothing_to_pad_with(folders, tmp_path):
    left = tokenizer_of(padding_side="left", truncation_side="left", bos_token="<s>")
    folder = str(text_model(tmp_path / "left", "llama", left))
    expected = load_any(folders["llama"], 5).encode(CAPTIONS)
    for found, wanted in zip(load_any(folder, 5).encode(CAPTIONS), expected, strict=True):
        torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=0)


@pytest.mark.parametrize(("given", "token"), [("bos_token", "<s>"), ("eos_token", "</s>")])
def test_a_caption_without_tokens_is_the_one_that_begins_or_ends_a_text(tmp_path, given, token):
    tokenizer = tokenizer_of(start=False, end=False, **{given: token})
    encoder = load_any(str(text_model(tmp_path, "llama", tokenizer)))
    assert [len(each.tokens) for each in encoder.encode(CAPTIONS)] == [3, 2, 1, 11]
    [expected] = hidden_states(AutoModel.from_pretrained(tmp_path), tokenizer, [token])
    for captions in ([""], CAPTIONS):
        found = encoder.encode(captions)[captions.index("")].tokens
        torch.testing.assert_close(found, expected, **CLOSE)


def test_an_empty_caption_by_qwens_own_tokenizer(folders):
    model, tokenizer = whole(folders["qwen2"])
    assert tokenizer("")["input_ids"] == []
    [expected] = hidden_states(model, tokenizer, ["<|endoftext|>"])
    found = load_any(folders["qwen2"]).encode(CAPTIONS)
    torch.testing.assert_close(found[2].tokens, expected, **CLOSE)
    assert [len(each.tokens) for each in found] == [len(text) or 1 for text in CAPTIONS]


def test_captions_are_cut_at_what_the_model_and_its_tokenizer_can_take(tmp_path):
    short = str(text_model(tmp_path / "short", "bert", max_position_embeddings=7))
    tokenizer = tokenizer_of(pad_token="<pad>", model_max_length=6)
    shorter = str(text_model(tmp_path / "shorter", "bert", tokenizer))
    for folder, asked, limit in ((short, 128, 7), (short, 5, 5), (shorter, 128, 6)):
        encoder = load_any(folder, asked)
        assert encoder.max_tokens == describe_any(folder, asked).max_tokens == limit
        assert [len(each.tokens) for each in encoder.encode(CAPTIONS)] == [
            min(length, limit) for length in (5, 4, 2, 13)
        ]


def test_the_dtype_is_what_is_asked_for_or_what_is_stored(folders, tmp_path):
    folder = folders["llama"]
    stored = str(tmp_path / "stored")
    model, tokenizer = whole(folder)
    model.bfloat16().save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    expected = hidden_states(model, tokenizer)
    for encoder in (load_any(folder, dtype=torch.bfloat16), load_any(stored)):
        for found, wanted in zip(encoder.encode(CAPTIONS), expected, strict=True):
            torch.testing.assert_close(found.tokens, wanted, rtol=0.05, atol=0.05)
            assert torch.equal(found.tokens, found.tokens.bfloat16().float())
    exact = load_any(folder).encode(CAPTIONS)[0].tokens
    assert not torch.equal(exact, exact.bfloat16().float())


class TestDigest:
    @pytest.mark.parametrize("kind", ["bert", "gemma3", "bart"])
    def test_is_known_without_the_weights(self, folders, kind, monkeypatch):
        folder = folders[kind]
        encoders = [load_any(folder, 9), load_any(folder, 9, dtype=torch.bfloat16)]
        monkeypatch.setattr(AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        facts = [describe_any(folder, 9), describe_any(folder, 9, torch.bfloat16)]
        assert [(f.digest, f.width, f.max_tokens) for f in facts] == [
            (e.digest, e.width, e.max_tokens) for e in encoders
        ]
        assert len({facts[0].digest, facts[1].digest, describe_any(folder, 8).digest}) == 3

    def test_is_of_weights_tokenizer_and_settings(self, folders, tmp_path):
        digests = {describe_any(folders["bert"]).digest}
        for name, key in (("config.json", "layer_norm_eps"), ("tokenizer_config.json", "new")):
            folder = Path(shutil.copytree(folders["bert"], tmp_path / name))
            settings = json.loads((folder / name).read_text()) | {key: 0.5}
            (folder / name).write_text(json.dumps(settings))
            digests.add(describe_any(str(folder)).digest)
        folder = Path(shutil.copytree(folders["bert"], tmp_path / "weights"))
        weights = load_file(folder / "model.safetensors")
        weights["embeddings.LayerNorm.weight"][0] += 1e-3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        digests.add(describe_any(str(folder)).digest)
        assert len(digests) == 4


class TestRefused:
    @pytest.mark.parametrize("function", [load_any, describe_any])
    def test_a_model_that_only_sees(self, tmp_path, function):
        folder = str(text_model(tmp_path, "vit"))
        with pytest.raises(UserError, match=f"{folder} .*ViTModel takes no tokens .*: give"):
            function(folder)

    @pytest.mark.parametrize("function", [load_any, describe_any])
    def test_a_folder_without_a_tokenizer(self, tmp_path, function):
        folder = text_model(tmp_path, "bert")
        for file in folder.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(UserError, match=f"{folder} has no tokenizer .*: copy its files"):
            function(str(folder))

    def test_a_tokenizer_that_cannot_be_read(self, tmp_path):
        folder = text_model(tmp_path, "bert")
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match=f"{folder} has a tokenizer that .* cannot read"):
            describe_any(str(folder))

    @pytest.mark.parametrize("function", [load_any, describe_any])
    def test_code_of_the_folders_own_is_never_run(self, tmp_path, function):
        folder = text_model(tmp_path, "bert")
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
        told = config | {"model_type": "own", "auto_map": names}
        (folder / "config.json").write_text(json.dumps(told))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(UserError, match=f"{folder} holds no text model .*without code"):
            function(str(folder))
        assert not (tmp_path / "ran").exists()

    def test_weights_that_are_not_all_there(self, tmp_path):
        """Transformers would make up the rest; the pooler's are not used."""
        folder = text_model(tmp_path, "bert")
        weights = load_file(folder / "model.safetensors")
        without = {name: value for name, value in weights.items() if "pooler" not in name}
        save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
        load_any(str(folder))
        del without["encoder.layer.1.output.dense.weight"]
        save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{folder} lacks 1 weights .*layer.1.output.dense"):
            load_any(str(folder))
