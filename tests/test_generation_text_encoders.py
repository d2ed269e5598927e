"""Models whose captions were embedded by other encoders, or stored otherwise than usual."""

from pathlib import Path

import pytest
from text_models import text_model
from tiny_project import MAX_TOKENS, WIDTH, model_config, random_network, text_references

from ldm_core.errors import UserError
from ldm_core.generation import PictureGenerator, PictureRequest
from ldm_core.latents.stored import made_by, stored_as
from ldm_core.model_directory import Reference, save_model
from ldm_core.text.token_encoders import describe_tokens


def saved(root: Path, **texts: Reference) -> str:
    config = model_config(text_references(str(root)) | texts)
    width = describe_tokens(config.t5.uri).width
    backbone = config.backbone.model_copy(update={"text_width": width})
    config = config.model_copy(update={"backbone": backbone})
    weights = random_network(backbone).state_dict()
    save_model(str(root / "teacher"), config, weights, "# A card\n")
    return str(root / "teacher")


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_captions_are_embedded_by_what_embedded_the_stores(tmp_path, name):
    texts = text_references(str(tmp_path))
    uri = texts["clip"].uri if name == "clip" else str(text_model(tmp_path / name, name))
    t5 = Reference(uri=uri, digest=describe_tokens(uri, MAX_TOKENS).digest)
    generator = PictureGenerator.load(saved(tmp_path, t5=t5))
    assert generator.encoders[0].width == (WIDTH if name == "clip" else 16)
    one, other = generator.generate([PictureRequest("a red cat", 3), PictureRequest("a dog", 3)])
    assert (one != other).any()


def test_how_a_store_keeps_embeddings_is_no_matter_of_the_encoders(tmp_path):
    texts = text_references(str(tmp_path))
    kept = {
        "t5": stored_as(texts["t5"].digest, "int8-b16"),
        "clip": stored_as(texts["clip"].digest, "int8-b16", both=True),
    }
    references = {name: Reference(uri=texts[name].uri, digest=kept[name]) for name in kept}
    generator = PictureGenerator.load(saved(tmp_path, **references))
    found = {"t5": generator.encoders[0].digest, "clip": generator.encoders[1].digest}
    assert found == {name: texts[name].digest for name in kept}
    other = Reference(uri=texts["t5"].uri, digest=stored_as("0123456789abcdef-12", "int8-b16"))
    with pytest.raises(UserError, match="was trained with t5 0123456789abcdef-12-int8-b16"):
        PictureGenerator.load(saved(tmp_path, t5=other))


@pytest.mark.parametrize("dtype", ["float16", "int8-b16"])
@pytest.mark.parametrize("both", [False, True])
def test_what_made_a_row_is_told_from_how_it_is_stored(dtype, both):
    assert made_by(stored_as("0123-77", dtype, both)) == "0123-77"
    assert stored_as("0123-77", "float16") == "0123-77"
