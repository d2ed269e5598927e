import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    MT5Config,
    MT5EncoderModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)

from ldm_core.errors import UserError
from ldm_core.files import upload_folder
from ldm_core.text.encoders import clip_digest, describe_clip, load_clip, load_t5, t5_digest
from ldm_core.text.tiny import build_tiny_text_encoders

WIDTH = 16
T5_SHAPE = {"d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
CAPTIONS = ["a red cat", "a dog", "", "two blue cats and a very large red dog on white"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("text")
    build_tiny_text_encoders(CAPTIONS, str(root / "t5"), str(root / "clip"), WIDTH, seed=1)
    return root / "t5", root / "clip"


def padded(folder: Path, captions: list[str] = CAPTIONS) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(captions, padding=True, return_tensors="pt"))


def hidden(model: torch.nn.Module, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    batch = padded(folder)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state, mask.sum(1)


def assert_tokens_are(encoder, expected: torch.Tensor, lengths: torch.Tensor) -> None:
    for row, embedding in enumerate(encoder.encode(CAPTIONS)):
        torch.testing.assert_close(embedding.tokens, expected[row, : lengths[row]])
        assert embedding.pooled is None


def test_t5_is_what_transformers_computes(folders):
    expected, lengths = hidden(T5EncoderModel.from_pretrained(folders[0]), folders[0])
    encoder = load_t5(str(folders[0]))
    assert_tokens_are(encoder, expected, lengths)
    assert encoder.width == WIDTH
    assert [len(e.tokens) for e in encoder.encode(CAPTIONS)] == [4, 3, 1, 12]  # words and an end


def test_clip_is_what_transformers_computes(folders):
    model = CLIPTextModel.from_pretrained(folders[1]).eval()
    with torch.no_grad():
        expected = model(**padded(folders[1])).pooler_output
    embeddings = load_clip(str(folders[1])).encode(CAPTIONS)
    torch.testing.assert_close(torch.stack([e.pooled for e in embeddings]), expected)
    assert all(e.tokens is None for e in embeddings)


def test_clips_tokens_are_its_last_layer_without_padding(folders):
    expected, lengths = hidden(CLIPTextModel.from_pretrained(folders[1]), folders[1])
    pooled = load_clip(str(folders[1])).encode(CAPTIONS)
    found = load_clip(str(folders[1]), tokens=True).encode(CAPTIONS)
    for row, (embedding, alone) in enumerate(zip(found, pooled, strict=True)):
        torch.testing.assert_close(embedding.tokens, expected[row, : lengths[row]])
        torch.testing.assert_close(embedding.pooled, alone.pooled)


@pytest.fixture(scope="module")
def other_clip(folders, tmp_path_factory) -> str:
    """Twice as wide, with the same words."""
    root = tmp_path_factory.mktemp("other")
    build_tiny_text_encoders(CAPTIONS, str(root / "t5"), str(root / "clip"), 2 * WIDTH, seed=2)
    return str(root / "clip")


def test_two_clips_lie_side_by_side(folders, other_clip):
    uri = f"{folders[1]} + {other_clip}"
    both = load_clip(uri, tokens=True)
    assert (both.name, both.width, both.max_tokens) == ("clip", 3 * WIDTH, 77)
    one, other = (load_clip(each, tokens=True).encode(CAPTIONS) for each in uri.split(" + "))
    for found, first, second in zip(both.encode(CAPTIONS), one, other, strict=True):
        assert torch.equal(found.pooled, torch.cat([first.pooled, second.pooled]))
        assert torch.equal(found.tokens, torch.cat([first.tokens, second.tokens], 1))
    assert load_clip(uri).encode(CAPTIONS)[0].tokens is None
    turned = " + ".join(reversed(uri.split(" + ")))
    assert clip_digest(uri, 50) == load_clip(uri, 50).digest
    assert len({clip_digest(each) for each in (uri, turned, *uri.split(" + "))}) == 4


def test_two_clips_of_other_words_have_no_common_tokens(folders, tmp_path):
    config = json.loads((folders[1] / "tokenizer.json").read_text())
    config["post_processor"] = None  # neither start nor end
    other = Path(shutil.copytree(folders[1], tmp_path / "clip"))
    (other / "tokenizer.json").write_text(json.dumps(config))
    uri = f"{folders[1]} + {other}"
    assert load_clip(uri).encode(["a red cat"])[0].pooled.shape == (2 * WIDTH,)
    with pytest.raises(UserError, match=r"'a red cat' into \[3, 5\] tokens"):
        load_clip(uri, tokens=True).encode(["a red cat"])


def test_two_clips_that_cut_at_different_lengths_are_refused_before_any_caption(folders, tmp_path):
    short = Path(shutil.copytree(folders[1], tmp_path / "clip"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    uri = f"{folders[1]} + {short}"
    with pytest.raises(UserError, match=r"at \[77, 32\] tokens.* set text.max_tokens=32"):
        describe_clip(uri, tokens=True)
    assert describe_clip(uri).max_tokens == 77
    assert describe_clip(uri, 32, tokens=True).max_tokens == 32


@pytest.mark.parametrize("index", [0, 1])
def test_a_caption_alone_is_as_in_a_batch(folders, index):
    encoder = (load_t5, load_clip)[index](str(folders[index]))
    for caption, among in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        [alone] = encoder.encode([caption])
        for one, other in ((alone.tokens, among.tokens), (alone.pooled, among.pooled)):
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_captions_differ(folders):
    t5, clip = load_t5(str(folders[0])), load_clip(str(folders[1]))
    swapped = ["a red dog and a blue cat", "a blue dog and a red cat"]
    first, second = clip.encode(swapped)
    assert (first.pooled - second.pooled).abs().max() > 1e-3
    first, second = t5.encode(swapped)
    assert (first.tokens[0] - second.tokens[0]).abs().max() > 1e-6  # the first word sees the rest


def test_long_captions_are_cut_and_keep_their_end(folders):
    caption = CAPTIONS[-1]
    t5 = load_t5(str(folders[0]), max_tokens=5)
    [cut], [short] = t5.encode([caption]), t5.encode([" ".join(caption.split()[:4])])
    assert cut.tokens.shape == (5, WIDTH)
    torch.testing.assert_close(cut.tokens, short.tokens)
    clip = load_clip(str(folders[1]), max_tokens=5)
    [cut], [short] = clip.encode([caption]), clip.encode([" ".join(caption.split()[:3])])
    torch.testing.assert_close(cut.pooled, short.pooled)


def test_clip_is_cut_at_its_own_positions(folders):
    encoder = load_clip(str(folders[1]), max_tokens=500)
    assert encoder.max_tokens == 77
    assert encoder.encode(["cat " * 300])[0].pooled.shape == (WIDTH,)


@pytest.mark.parametrize("index", [0, 1])
def test_digest(folders, tmp_path, index):
    load, folder = (load_t5, load_clip)[index], folders[index]
    digest = load(str(folder), 50).digest
    assert load(str(folder), 49).digest != digest  # other cuts, other embeddings
    model = (T5EncoderModel, CLIPTextModel)[index].from_pretrained(folder)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load(str(tmp_path), 50).digest == digest
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "layer_norm" in name)
    weights[name][0] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load(str(tmp_path), 50).digest != digest


@pytest.mark.parametrize(("load", "digest_of"), [(load_t5, t5_digest), (load_clip, clip_digest)])
def test_the_digest_is_known_without_the_model(folders, load, digest_of, monkeypatch):
    folder = str(folders[0 if load is load_t5 else 1])
    known = {tokens: load(folder, tokens).digest for tokens in (5, 200)}  # clip has 77 at most
    for kind in (T5EncoderModel, CLIPTextModel):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert {tokens: digest_of(folder, tokens) for tokens in known} == known
    with pytest.raises(UserError, match=r"nowhere .*config\.json"):
        digest_of("nowhere")


def test_building_twice_gives_the_same_bytes(folders, tmp_path):
    for name, captions, seed in (("same", CAPTIONS[::-1] * 2, 1), ("other", CAPTIONS, 2)):
        build_tiny_text_encoders(
            captions, str(tmp_path / name / "t5"), str(tmp_path / name / "clip"), WIDTH, seed
        )
    for folder in folders:
        same = {f.name: f.read_bytes() for f in (tmp_path / "same" / folder.name).iterdir()}
        assert same == {f.name: f.read_bytes() for f in folder.iterdir()}
        other = tmp_path / "other" / folder.name / "model.safetensors"
        assert other.read_bytes() != same["model.safetensors"]


def test_building_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    build_tiny_text_encoders(["a"], str(tmp_path / "t5"), str(tmp_path / "clip"), 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_from_a_bucket(folders, s3):
    for load, folder in zip((load_t5, load_clip), folders, strict=True):
        upload_folder(folder, f"{s3}/text/{folder.name}")
        local, remote = load(str(folder)), load(f"{s3}/text/{folder.name}")
        assert remote.digest == local.digest
        [here], [there] = local.encode(CAPTIONS[:1]), remote.encode(CAPTIONS[:1])
        for one, other in ((here.tokens, there.tokens), (here.pooled, there.pooled)):
            assert (one is None and other is None) or torch.equal(one, other)


class TestPublishedLayouts:
    """The configurations the published models come with, at toy size."""

    @staticmethod
    def save(model, tokenizer_of: Path, folder: Path) -> Path:
        torch.manual_seed(3)
        for parameter in model.parameters():  # also those the class starts at a constant
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
        return folder

    def test_clip_with_its_vision_half(self, folders, tmp_path):
        text = CLIPTextConfig.from_pretrained(folders[1])
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        config = CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
        )
        model = CLIPModel(config).eval()
        folder = self.save(model, folders[1], tmp_path)
        assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
        with torch.no_grad():
            expected = model.text_model(**padded(folder)).pooler_output
        encoder = load_clip(str(folder))
        torch.testing.assert_close(
            torch.stack([e.pooled for e in encoder.encode(CAPTIONS)]), expected
        )
        assert encoder.width == WIDTH
        assert clip_digest(str(folder), 200) == load_clip(str(folder), 200).digest

    def test_t5_with_its_decoder(self, folders, tmp_path):
        vocabulary = len(AutoTokenizer.from_pretrained(folders[0]))
        config = T5Config(vocab_size=vocabulary, decoder_start_token_id=0, **T5_SHAPE)
        model = T5ForConditionalGeneration(config)
        folder = self.save(model, folders[0], tmp_path)
        assert_tokens_are(load_t5(str(folder)), *hidden(model.encoder, folder))

    @pytest.mark.parametrize(
        ("config", "kind"), [(MT5Config, MT5EncoderModel), (UMT5Config, UMT5EncoderModel)]
    )
    def test_relatives_of_t5(self, folders, tmp_path, config: Callable, kind: Callable):
        vocabulary = len(AutoTokenizer.from_pretrained(folders[0]))
        model = kind(config(vocab_size=vocabulary, **T5_SHAPE))
        folder = self.save(model, folders[0], tmp_path)
        assert_tokens_are(load_t5(str(folder)), *hidden(model, folder))


def test_another_kind_of_model_is_refused_by_name(folders, tmp_path):
    t5, clip = map(str, folders)
    with pytest.raises(UserError, match=f"{clip} holds a model of type 'clip_text_model'; .*'t5'"):
        load_t5(clip)
    with pytest.raises(UserError, match=f"{t5} holds a model of type 't5'; .*'clip'"):
        load_clip(t5)
    with pytest.raises(UserError, match=f"no text encoder at {tmp_path}/missing"):
        load_t5(f"{tmp_path}/missing")


@pytest.mark.parametrize("index", [0, 1])
def test_pickled_weights_are_refused_with_a_way_out(folders, tmp_path, index):
    model = AutoModel.from_pretrained(folders[index])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors .*save_pretrained"):
        (load_t5, load_clip)[index](str(tmp_path))
