"""Files of one data set that are the same, or look it, are told after an encode."""

import json
from pathlib import Path

import numpy as np
from picture_folder import picture, read_captions, write_captions
from PIL import Image
from six_pictures import newest, recipe
from tiny_runs import encode_here

from pipelines.recipes.schema import Recipe

__all__ = ["recipe"]


def duplicates(recipe: Recipe) -> list[dict]:
    return [*map(json.loads, Path(recipe.product("latents"), "duplicates.jsonl").open())]


def test_repeated_files_are_told(recipe, capsys):
    folder = Path(recipe.data)
    (folder / "copy.png").write_bytes((folder / "4.png").read_bytes())
    write_captions(folder, read_captions(folder) | {"copy.png": "picture 4"})
    assert encode_here(recipe).summary["duplicates"] == 1
    assert "duplicates: 1 with the bytes of another file; most" in capsys.readouterr().out
    assert duplicates(recipe) == [{"same": "bytes", "files": ["4.png", "copy.png"]}]
    picture(70).save(folder / "copy.png")
    encode_here(recipe)
    assert duplicates(recipe) == []


def test_groups_of_duplicates_are_listed_in_full_the_largest_first(recipe):
    folder, captions = Path(recipe.data), read_captions(Path(recipe.data))
    for name, source in {"a": 1, "b": 4, "c": 4}.items():
        (folder / f"{name}.png").write_bytes((folder / f"{source}.png").read_bytes())
    picture(4).save(folder / "d.png", compress_level=1)
    write_captions(folder, captions | dict.fromkeys(["a.png", "b.png", "c.png", "d.png"], "x"))
    assert encode_here(recipe).summary["duplicates"] == 3
    assert duplicates(recipe) == [
        {"same": "bytes", "files": ["4.png", "b.png", "c.png"]},
        {"same": "bytes", "files": ["1.png", "a.png"]},
        {"same": "dHash", "files": ["4.png", "b.png", "c.png", "d.png"]},
    ]


def test_pictures_that_only_look_alike_are_told(recipe, capsys):
    """One picture as JPEG of three qualities and a little smaller: no two have the same pixels."""
    folder = Path(recipe.data)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    photo = coarse.resize((320, 320), Image.Resampling.BICUBIC)
    for quality in (95, 75, 40):
        photo.save(folder / f"photo-{quality}.jpg", quality=quality)
    photo.resize((288, 288), Image.Resampling.LANCZOS).save(folder / "smaller.png")
    names = [*(f"photo-{quality}.jpg" for quality in (40, 75, 95)), "smaller.png"]
    write_captions(folder, read_captions(folder) | dict.fromkeys(names, "a photo"))
    assert encode_here(recipe).summary["duplicates"] == 0
    assert duplicates(recipe) == [{"same": "dHash", "files": names}]
    rows = newest(recipe).table("samples", ["source_id", "perceptual_hash"]).to_pylist()
    assert len({row["perceptual_hash"] for row in rows if row["source_id"] in names}) > 1
    told = "duplicates: 3 that look like another; most often, 4 times"
    assert f"{told}: photo-40.jpg, photo-75.jpg, photo-95.jpg" in capsys.readouterr().out
