"""What a model's card says of itself."""

import shlex

import pytest
from small_store import small_store
from tiny_project import IDENTITY, model_config

from pipelines.cards import student_card, teacher_card
from pipelines.recipes import RECIPES


@pytest.mark.parametrize("card", [teacher_card, student_card])
def test_a_card_asks_for_what_the_model_was_trained_on(tmp_path, card):
    version = small_store(tmp_path, captions=(("a dog's\nbowl",),))
    lineage = {"run": "r", "store": str(tmp_path), "store_version": "1", "teacher": "t"}
    config = model_config({"t5": IDENTITY, "clip": IDENTITY})
    config = config.model_copy(update={"lineage": lineage})
    text = card(RECIPES["image-s"](), config, version)
    assert "shapes" not in text
    _, line, _ = text.split("```")
    assert shlex.split(line)[-2:] == ["--prompt", "a dog's bowl"]
