"""A model directory holds a transformer of diffusers, and it draws as diffusers' module does."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusers as tiny
import torch
from tiny_project import SIZE, WIDTH, model_config, text_references

from ldm_core import random
from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.errors import UserError
from ldm_core.generation import PictureGenerator, PictureRequest
from ldm_core.model_directory import load_model, read_config, save_model

STEPS, SCALE = 3, 2.0


@pytest.fixture
def saved(tmp_path):
    """(uri, diffusers' module, its configuration, digest) of a Wan."""
    model = tiny.wan(in_channels=3, out_channels=3, text_dim=WIDTH)
    backbone = DiffusersConfig(transformer={"_class_name": type(model).__name__, **model.config})
    config = model_config(text_references(str(tmp_path))).model_copy(update={"backbone": backbone})
    uri = str(tmp_path / "teacher")
    return uri, model, backbone, save_model(uri, config, model.state_dict(), "a card")


def test_it_comes_back(saved):
    uri, model, backbone, digest = saved
    config, network, again = load_model(uri)
    assert isinstance(network, DiffusersFlow)
    assert (config.backbone, read_config(uri).backbone, again) == (backbone, backbone, digest)
    for name, weight in model.state_dict().items():
        assert torch.equal(network.state_dict()[name], weight)


@torch.no_grad()
def test_it_draws_what_its_module_draws(saved):
    """Euler's steps with guidance, by diffusers' module called as it is published to be called."""
    uri, model, _, _ = saved
    generator = PictureGenerator.load(uri)
    x = random.normal(3, "picture", 0, torch.zeros(1, dtype=torch.int64), (3, SIZE, SIZE))
    for index in range(STEPS):
        t = 1 - index / STEPS
        with_caption, without = (
            velocity(model, x, t, generator.embed([text])) for text in ("a red cat", "")
        )
        x = x - (without + SCALE * (with_caption - without)) / STEPS
    [picture] = generator.generate([PictureRequest("a red cat", 3, STEPS, SCALE)])
    expected = generator.decode(x)[0]
    assert np.abs(picture.astype(int) - expected.astype(int)).max() <= 1
    assert picture.std() > 5


def velocity(model, x, t, cond):
    tokens = torch.nn.functional.pad(cond.tokens, (0, 0, 0, 512 - cond.tokens.shape[1]))
    time = torch.tensor([1000 * t])
    return model(x[:, :, None], time, tokens, return_dict=False)[0][:, :, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "EvilModel"}, "backbone.diffusers.*EvilModel"),
        ({"num_layers": 2}, "is not what its config.json describes"),
    ],
)
def test_a_damaged_one_is_refused(saved, change, said):
    uri = saved[0]
    stored = json.loads(Path(uri, "config.json").read_text())
    stored["backbone"]["transformer"] |= change
    Path(uri, "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=said):
        load_model(uri)
