"""A model directory holds a DiT or an MMDiT, and those written before still load."""

import json
from pathlib import Path

import pytest
import torch
from tiny_project import IDENTITY, SIZE, WIDTH, model_config, text_references, tiny_project

from ldm_core.backbones.dit import DiT
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.generation import PictureGenerator, PictureRequest
from ldm_core.model_directory import load_model, model_digest, save_model

SMALL = MMDiTConfig(
    in_channels=3, patch_size=2, width=16, depth=2, heads=2, text_width=WIDTH, pooled_width=WIDTH,
    rotary=(4, 2, 2),
)  # fmt: skip


def saved(root: Path, **changes: object) -> tuple[str, MMDiT, str]:
    torch.manual_seed(0)
    network = MMDiT(SMALL)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    config = model_config(text_references(str(root)))
    config = config.model_copy(update={"backbone": SMALL, **changes})
    uri = str(root / "teacher")
    return uri, network, save_model(uri, config, network.state_dict(), "a card")


def test_an_mmdit_comes_back(tmp_path):
    uri, network, digest = saved(tmp_path)
    config, loaded, again = load_model(uri)
    assert isinstance(loaded, MMDiT)
    assert (config.backbone, again) == (SMALL, digest)
    for name, weight in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_it_draws(tmp_path):
    generator = PictureGenerator.load(saved(tmp_path)[0])
    pictures = generator.generate([PictureRequest("a red cat", seed, steps=2) for seed in (0, 1)])
    assert pictures.shape == (2, SIZE, SIZE, 3)
    assert (pictures[0] != pictures[1]).any()


def test_a_directory_from_before_there_were_videos_and_kinds(tmp_path):
    uri = tiny_project(tmp_path)
    digest = load_model(uri)[2]
    stored = json.loads(Path(uri, "config.json").read_text())
    del stored["backbone"]["frame_pairs"], stored["backbone"]["qk_norm"]
    Path(uri, "config.json").write_text(json.dumps(stored))
    config, network, same = load_model(uri)
    assert isinstance(network, DiT)
    assert (config.backbone.frame_pairs, config.backbone.qk_norm, same) == (0, True, digest)


def test_digests_are_those_of_the_program_before_fields_were_added():
    """The first was told by the program that had no `qk_norm` in a DiT."""
    config = model_config({"t5": IDENTITY, "clip": IDENTITY})
    plain = config.backbone.model_copy(update={"qk_norm": False})
    assert model_digest(config, b"") == "f87479be2d7177b4"
    assert model_digest(config.model_copy(update={"backbone": plain}), b"") != "f87479be2d7177b4"


@pytest.mark.parametrize(("field", "value"), [("width", 15), ("heads", "many"), ("detph", 3)])
def test_a_damaged_backbone_is_named(tmp_path, field, value):
    uri = saved(tmp_path)[0]
    stored = json.loads(Path(uri, "config.json").read_text())
    stored["backbone"][field] = value
    Path(uri, "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="config.json is damaged .*: backbone.mmdit"):
        load_model(uri)
