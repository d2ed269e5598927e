"""The transformer of a train section: positions of heads, videos, what a recipe declares."""

import pytest
import torch

from ldm_core.backbones.dit import DiT
from ldm_core.backbones.mmdit import MMDiT
from ldm_core.errors import UserError
from pipelines.backbones import (
    backbone_config,
    declared_space,
    lists_of_blocks,
    new_backbone,
    rotary_channels,
)
from pipelines.recipe_options import Arguments
from pipelines.recipes import RECIPES
from pipelines.recipes.sections import TrainSection


@pytest.mark.parametrize("head", [8, 16, 24, 32, 64, 72, 96, 128])
def test_channels_that_turn_are_even_and_all_of_the_head(head):
    channels = rotary_channels(head)
    assert sum(channels) == head
    assert all(count > 0 and count % 2 == 0 for count in channels)


def test_channels_that_turn_are_those_of_flux():
    assert rotary_channels(128) == (16, 56, 56)


def test_a_dit_of_clips_tells_frames_apart_and_one_of_pictures_does_not():
    section = TrainSection(width=64, heads=2, depth=1)
    assert backbone_config(section, (4, 8, 8), 5, 3).frame_pairs == 0
    assert backbone_config(section, (4, 3, 8, 8), 5, 3).frame_pairs == 4
    meant = section.model_copy(update={"buckets": ("64x64x1", "64x64x9")})
    assert backbone_config(meant, (4, 8, 8), 5, 3).frame_pairs == 4


@pytest.mark.parametrize("backbone", ["dit", "mmdit"])
def test_networks_of_a_section(backbone):
    section = TrainSection(backbone=backbone, width=32, heads=2, depth=2, mlp_ratio=2.0)
    config = backbone_config(section, (4, 8, 8), 5, 3)
    network = new_backbone(config)
    assert isinstance(network, DiT if backbone == "dit" else MMDiT)
    assert config.mlp_ratio == 2.0
    matrices = {"dit": 2, "mmdit": 2}  # lists: of the caption and of the image; joint and single
    assert len(lists_of_blocks(network)) == matrices[backbone]


def test_what_recipes_declare():
    spaces = {name: declared_space(make()) for name, make in RECIPES.items()}
    assert spaces["image-s"].main == (3, 16, 16)
    assert spaces["flux-12b"].main == (16, 128, 128)
    assert dict(spaces["video-14b"].latents) == {
        "480x848x93": (16, 24, 60, 106), "480x848x1": (16, 60, 106),
    }  # fmt: skip
    assert (spaces["flux-12b"].text_width, spaces["flux-12b"].max_tokens) == (4096, 512)
    assert spaces["image-tiny"].text_width == 16


def test_buckets_that_do_not_become_whole_latents():
    recipe = Arguments("video-1b", overrides=("train.buckets=[480x830x81]",)).resolve()
    with pytest.raises(UserError, match="480x830x81 .* downsampling 8 .* multiples of 8"):
        declared_space(recipe)


def test_the_networks_take_what_they_are_meant_for():
    """At the toys' size for real; on the meta device at the others'."""
    for name in ("image-tiny", "video-s", "mmdit-2b"):
        recipe = RECIPES[name]()
        space = declared_space(recipe)
        config = backbone_config(recipe.train, space.main, space.text_width, space.pooled_width)
        from ldm_core.conditioning.text import TextCondition

        with torch.device("meta" if name == "mmdit-2b" else "cpu"):
            mask = torch.ones(1, 3, dtype=torch.bool)
            caption = TextCondition(
                torch.zeros(1, 3, space.text_width), mask, torch.zeros(1, space.pooled_width)
            )
            x_t = torch.zeros(1, *space.main)
            assert new_backbone(config)(x_t, torch.zeros(1), caption).shape == x_t.shape
