"""Which family's loader a folder gets; ByT5, and CLIP where it is to give the tokens."""

from pathlib import Path

import pytest
import torch
from text_models import CAPTIONS, text_model
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from ldm_core.errors import UserError
from ldm_core.text.any_encoder import load_any
from ldm_core.text.encoders import clip_digest, load_clip, load_t5, t5_digest
from ldm_core.text.tiny import build_tiny_text_encoders
from ldm_core.text.token_encoders import describe_tokens, load_tokens

WIDTH = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for name, width in (("small", WIDTH), ("large", 2 * WIDTH)):
        places = (str(root / name / "t5"), str(root / name / "clip"))
        build_tiny_text_encoders(CAPTIONS, *places, width, seed=width)
    text_model(root / "bert", "bert")
    return root


@pytest.fixture(scope="module")
def byt5(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("byt5")
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=384, d_model=WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def assert_same(found, expected) -> None:
    for one, other in zip(found.encode(CAPTIONS), expected.encode(CAPTIONS), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.pooled is None
    facts = (found.digest, found.width, found.max_tokens)
    assert facts == (expected.digest, expected.width, expected.max_tokens)
    assert found.name == "t5"


def test_each_family_by_the_models_type(root):
    clip = str(root / "small" / "clip")
    assert_same(
        load_tokens(str(root / "small" / "t5"), 50), load_t5(str(root / "small" / "t5"), 50)
    )
    assert_same(load_tokens(clip, 50), load_clip(clip, 50, tokens=True))
    assert_same(load_tokens(str(root / "bert"), 50), load_any(str(root / "bert"), 50))


def test_two_clips(root):
    uri = f"{root}/small/clip + {root}/large/clip"
    assert_same(load_tokens(uri, 50), load_clip(uri, 50, tokens=True))
    assert load_tokens(uri).encode(CAPTIONS)[0].tokens.shape == (5, 3 * WIDTH)
    with pytest.raises(UserError, match=r"bert holds a model of type 'bert'; expected .*'clip'"):
        load_tokens(f"{root}/small/clip + {root}/bert")


@pytest.mark.parametrize("name", ["small/t5", "small/clip", "bert", "small/clip + large/clip"])
def test_all_is_known_without_the_weights(root, name):
    uri = " + ".join(str(root / each) for each in name.split(" + "))
    for limit in (7, 500):
        facts, encoder = describe_tokens(uri, limit), load_tokens(uri, limit)
        told = (encoder.digest, encoder.width, encoder.max_tokens)
        assert (facts.digest, facts.width, facts.max_tokens) == told


def test_digests_of_t5_and_clip_are_what_they_were(root):
    t5, clip = str(root / "small" / "t5"), str(root / "small" / "clip")
    assert describe_tokens(t5, 50).digest == t5_digest(t5, 50)
    assert describe_tokens(clip, 50).digest == clip_digest(clip, 50)


class TestByT5:
    def test_a_token_is_a_byte(self, byt5):
        """Of UTF-8, three places up, and an end: https://arxiv.org/abs/2105.13626, section 3.1."""
        captions = [*CAPTIONS, "çà"]
        model = T5EncoderModel.from_pretrained(byt5).eval()
        found = load_tokens(str(byt5)).encode(captions)
        for caption, embedding in zip(captions, found, strict=True):
            ids = [byte + 3 for byte in caption.encode()] + [1]
            with torch.no_grad():
                [expected] = model(input_ids=torch.tensor([ids])).last_hidden_state
            torch.testing.assert_close(embedding.tokens, expected, rtol=1e-4, atol=1e-5)

    def test_captions_are_cut_at_so_many_bytes(self, byt5):
        encoder = load_tokens(str(byt5), 8)
        one, other = encoder.encode(["a red dog", "a red door and more"])
        assert one.tokens.shape == (8, WIDTH)
        torch.testing.assert_close(one.tokens, other.tokens)  # "a red d" is both's beginning

    def test_its_digest_is_of_its_tokenizer_too(self, byt5, tmp_path):
        T5EncoderModel.from_pretrained(byt5).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"{tmp_path} has no tokenizer"):
            describe_tokens(str(tmp_path))
        ByT5Tokenizer(extra_ids=100).save_pretrained(tmp_path)
        assert describe_tokens(str(tmp_path)).digest != describe_tokens(str(byt5)).digest
        ByT5Tokenizer().save_pretrained(tmp_path)
        assert describe_tokens(str(tmp_path)).digest == describe_tokens(str(byt5)).digest
