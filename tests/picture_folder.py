"""A folder of small pictures with captions, good files and bad ones, as users have them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

GOOD, SIZE = 22, 16
BAD = {
    "empty.png": "empty file",
    "gone.png": "file missing",
    "nocaption.png": "no caption",
    "text.jpg": "not an image",
    "truncated.png": "truncated",
}


def picture(index: int) -> Image.Image:
    rng = np.random.default_rng(index)
    size = (20 + index % 3, 24 - index % 5)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file": file, "caption": text}) for file, text in captions.items()]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def read_captions(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "captions.jsonl").read_text().splitlines())
    return {row["file"]: row["caption"] for row in rows}


def picture_folder(folder: Path) -> Path:
    """Fill an empty folder with good and bad files, in a subfolder too."""
    (folder / "more").mkdir()
    names = [f"{'more/' if i % 4 == 0 else ''}{i:03d}.png" for i in range(GOOD)]
    for index, name in enumerate(names):
        picture(index).save(folder / name)
    whole = (folder / names[1]).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    picture(99).save(folder / "nocaption.png")
    captions = {name: f"picture {i % 6}" for i, name in enumerate(names)}
    write_captions(folder, captions | {name: "bad" for name in BAD if name != "nocaption.png"})
    return folder
