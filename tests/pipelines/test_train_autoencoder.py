"""The autoencoder's stage without Ray: what makes it stale, which pictures it is measured on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import tiny_recipe

from ldm_core.autoencoders.training import halved
from ldm_core.errors import UserError
from ldm_core.latents.reader import sample_key
from ldm_core.media.folder import list_captioned_images
from ldm_core.media.shapes import write_shapes
from pipelines import picture_reader
from pipelines import train_autoencoder as stage
from pipelines.picture_reader import HELD_OUT, Pictures, split
from pipelines.recipes.sections import AutoencoderSection
from pipelines.stage import Options


@pytest.mark.parametrize("count", [1, 2, 40, 5000])
def test_what_is_held_out_is_a_random_part_and_not_trained_on(count):
    rows, held_out = split(count, seed=3)
    assert len(held_out) == min(HELD_OUT, max(1, count // 16))
    assert sorted({*rows, *held_out}) == list(range(count))
    assert count == 1 or not set(rows) & set(held_out)
    if count == 5000:
        assert abs(held_out.mean() - count / 2) < 4 * count / np.sqrt(12 * HELD_OUT)
        assert set(split(count, seed=4)[1]) != set(held_out)


def test_another_picture_under_the_same_name_is_noticed(tmp_path, monkeypatch):
    write_shapes(tmp_path / "data", 4, 16, seed=0)
    recipe = tiny_recipe(str(tmp_path / "data"), str(tmp_path), autoencoder={"source": "train"})
    found = []
    monkeypatch.setattr(stage, "run_stage", lambda *args: found.append(args[4]["data"]))
    first = sorted(Path(tmp_path, "data", "images").iterdir())[0]
    for size in (None, None, 17):
        if size:
            Image.new("RGB", (size, size)).save(first)
        stage.train_autoencoder(recipe, Options())
    assert found[0] == found[1] != found[2]


def test_a_broken_picture_gives_way_to_one_of_its_own_set(tmp_path):
    write_shapes(tmp_path / "data", 40, 16, seed=0)
    images = list_captioned_images(str(tmp_path / "data")).images
    pictures = Pictures(images, 16, seed=0)
    for rows in (pictures.trained, pictures.held_out):
        for row in rows[:-1]:
            _path(pictures, row).write_bytes(b"broken")
        _, ids = pictures.batch(rows)
        assert set(ids.tolist()) == {sample_key(pictures.images[rows[-1]].id)}
    _path(pictures, pictures.held_out[-1]).write_bytes(b"broken")
    again = Pictures(images, 16, seed=0)
    with pytest.raises(UserError, match="of the 40 pictures none .* held out"):
        again.batch(again.held_out)


def _path(pictures: Pictures, row: int) -> Path:
    return Path(pictures.images[row].uri.removeprefix("file:"))


def test_decoded_pictures_are_kept_up_to_a_number_of_bytes(tmp_path, monkeypatch):
    write_shapes(tmp_path / "data", 4, 16, seed=0)
    monkeypatch.setattr(picture_reader, "CACHE_BYTES", 2 * 3 * 16**2 + 1)
    pictures = Pictures(list_captioned_images(str(tmp_path / "data")).images, 16, seed=0)
    pixels, ids = pictures.batch(np.arange(4))
    assert pixels.shape == (4, 3, 16, 16)
    assert len(set(ids.tolist())) == 4
    assert pictures._read.cache_info().currsize == 2


def test_the_share_of_steps_that_halve(tmp_path):
    def halving(share: float, steps: int) -> list[bool]:
        settings = {"source": "train", "halved_share": share}
        recipe = tiny_recipe(str(tmp_path), str(tmp_path), autoencoder=settings)
        return [stage._halves(recipe, step) for step in range(steps)]

    assert not any(halving(0.0, 100))
    assert all(halving(1.0, 100))
    some = halving(0.4, 2000)
    assert abs(np.mean(some) - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 2000)
    assert some[1000:1100] == halving(0.4, 1100)[1000:]  # whatever was asked before


def test_a_halved_step_is_compared_with_halved_pictures():
    seen = []

    def reconstruct(pixels: torch.Tensor, eps: torch.Tensor, halve: bool):
        seen.append(halve)
        decoded = halved(pixels) if halve else pixels  # a perfect autoencoder
        return decoded, torch.zeros_like(eps), torch.zeros_like(eps)

    pixels, eps = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 4, 4)
    section = AutoencoderSection(steps=1)
    for halve in (False, True):
        assert stage._loss(section, reconstruct, pixels, eps, halve).tolist() == [0, 0]
    assert seen == [False, True]
