"""The encode stage on videos and on pictures of many shapes, with its workers in this process."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from picture_folder import picture, write_captions
from PIL import Image
from tiny_autoencoders import cosmos, ltx, wan
from tiny_runs import encode_here
from video_files import encode as video_file
from video_files import numbered, numbers

from ldm_core.autoencoders.autoencoder import autoencoder_facts, load_autoencoder
from ldm_core.latents.reader import LatentReader
from ldm_core.latents.schema import TABLES, decode_array
from ldm_core.latents.store import LatentStore, StoreVersion
from ldm_core.latents.verify import verify
from ldm_core.media.locators import MediaReader
from ldm_core.media.pixels import to_image, to_pixels
from pipelines import encode_media
from pipelines.encode_files import read_together
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, TrainSection

RATE = 8
KEYS = ("id", "encoder", "caption_digest")


def project(folder: Path, size: int, source: str = "identity", **encode: object) -> Recipe:
    return Recipe(
        name="test",
        data=str(folder / "data"),
        root=str(folder / "root"),
        size=size,
        autoencoder=AutoencoderSection(source=source),
        text=TextSection(tiny_width=8),
        encode=EncodeSection.model_validate({"batch_size": 8, "max_aspect": 2} | encode),
        train=TrainSection(patch_size=1),
    )


def encoded(recipe: Recipe) -> StoreVersion:
    encode_here(recipe)
    return LatentStore(recipe.product("latents")).open_version()


def cells(version: StoreVersion, table: str, *without: str) -> list[dict]:
    """Every row, in an order of its own, but for its shard: `content` is of the samples alone."""
    columns = [name for name in TABLES[table].names if name not in ("shard", *without)]
    rows = version.table(table, columns).to_pylist()
    return sorted(rows, key=lambda row: str([row.get(name) for name in KEYS]))


def saved(module: torch.nn.Module, folder: Path) -> str:
    module.save_pretrained(folder)
    return str(folder)


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


def latents_of(row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    mean, logvar = (
        decode_array(row[f"latent_{k}"], row["latent_shape"]) for k in ("mean", "logvar")
    )
    return torch.from_numpy(mean.copy()).float(), torch.from_numpy(logvar.copy()).float()


def put_videos(folder: Path, **lengths: int) -> None:
    for name, count in lengths.items():
        (folder / "data" / f"{name}.mp4").write_bytes(video_file(numbered(count, 64, 64), fps=RATE))
    write_captions(folder / "data", {f"{name}.mp4": f"the video {name}" for name in lengths})


def test_clips_keep_the_order_and_the_time_of_their_frames(folder):
    put_videos(folder, long=40, short=6)
    version = encoded(project(folder, 64, frames=17, fps=RATE))
    rows = sorted(
        version.table("samples").to_pylist(), key=lambda row: (row["source_id"], row["part"])
    )
    told = [(row["source_id"], row["start_s"], row["frames"], row["parts"]) for row in rows]
    assert told == [
        ("long.mp4", 0.0, 17, 3), ("long.mp4", 17 / RATE, 17, 3), ("long.mp4", 34 / RATE, 6, 3),
        ("short.mp4", 0.0, 6, 1),
    ]  # fmt: skip
    for row in rows:
        first = round(row["start_s"] * RATE)
        frames = to_image(latents_of(row)[0].transpose(0, 1))  # the identity's latents are pixels
        assert numbers(frames) == list(range(first, first + row["frames"]))
        assert (row["media"], row["fps"], row["captions"][0]["caption"][:3]) == (
            "video",
            RATE,
            "the",
        )
    assert version.manifest.counts["rejects"] == 0


def test_at_half_the_rate_every_second_frame_is_kept(folder):
    put_videos(folder, a=21)
    version = encoded(project(folder, 64, frames=9, fps=RATE / 2))
    rows = sorted(version.table("samples").to_pylist(), key=lambda row: row["part"])
    shown = [numbers(to_image(latents_of(row)[0].transpose(0, 1))) for row in rows]
    assert shown == [list(range(0, 18, 2)), [18, 20]]


@pytest.mark.parametrize(("new", "stride"), [(wan, 4), (cosmos, 8), (ltx, 8)])
def test_a_roundtrip_of_videos_equals_encoding_directly(folder, new, stride):
    """Of autoencoders with a variance, and statistics of their own, and of Cosmos, without."""
    put_videos(folder, a=3 * stride + 2)
    torch.manual_seed(0)
    source = saved(new(), folder / "autoencoder")
    version = encoded(project(folder, 64, source, frames=1 + 2 * stride, fps=RATE))
    model = load_autoencoder(source)
    rows = sorted(version.table("samples").to_pylist(), key=lambda row: row["part"])
    assert [row["frames"] for row in rows] == [1 + 2 * stride, 1 + stride]
    assert [row["latent_shape"][1] for row in rows] == [3, 2]  # the first, and every few after it
    for row in rows:
        height, width, count = map(int, row["bucket"].split("x"))
        start = round(row["start_s"] * RATE)
        video = decoded_by_hand(folder / "data/a.mp4", start, count, (width, height), row)
        direct = model.encode(video)
        kept, logvar = latents_of(row)
        torch.testing.assert_close(kept, direct.mean[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logvar, direct.logvar[0], rtol=1e-3, atol=1e-3)
        decoded = model.decode(kept[None])
        assert decoded.shape == video.shape
        assert (decoded - model.decode(direct.mean)).abs().max() < 1e-2
    mean, std = version.manifest.statistics.mean, version.manifest.statistics.std
    if model.latents_mean:
        assert (mean, std) == (model.latents_mean, model.latents_std)
    else:
        values = torch.cat([latents_of(row)[0].flatten(1) for row in rows], dim=1)
        torch.testing.assert_close(torch.tensor(mean), values.mean(1), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            torch.tensor(std), values.std(1, correction=0), rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize("new", [None, wan])
def test_a_clip_of_one_frame_has_the_shape_of_the_pictures_beside_it(folder, new):
    """Whatever comes first in a batch."""
    put_videos(folder, **{f"{k}{end}": 1 for k in range(3) for end in ("a", "z")})
    names = [f"{k}m.png" for k in range(3)]
    for name in names:
        picture(1).resize((64, 64)).save(folder / "data" / name)
    captions = {file.name: "one" for file in (folder / "data").glob("*.[mp]*")}
    write_captions(folder / "data", captions)
    source = saved(new(), folder / "autoencoder") if new else "identity"
    version = encoded(project(folder, 64, source, batch_size=2, shard_size=4, fps=RATE))
    assert version.manifest.buckets == {"64x64x1": 9}
    shapes = {tuple(row["latent_shape"]) for row in version.table("samples").to_pylist()}
    assert shapes == {(4, 16, 16) if new else (3, 64, 64)}
    assert not [check for check in verify(version, autoencoder_facts(source)) if check.failed]


def decoded_by_hand(
    file: Path, start: int, count: int, size: tuple[int, int], row: dict
) -> torch.Tensor:
    """(1, 3, T, H, W): the crop that the row tells, of PyAV's own frames."""
    import av

    box = [row[f"crop_{side}"] for side in ("left", "top", "right", "bottom")]
    with av.open(str(file)) as video:
        images = [frame.to_image() for frame in video.decode(video=0)][start : start + count]
    fitted = [
        np.asarray(image.crop(box).resize(size, Image.Resampling.LANCZOS)) for image in images
    ]
    return to_pixels(np.stack(fitted)).transpose(0, 1)[None]


def test_pictures_of_all_shapes_keep_their_shape(folder):
    sizes = {
        "wide.png": (96, 48),
        "tall.png": (40, 80),
        "square.png": (70, 70),
        "small.png": (20, 24),
    }
    for name, size in sizes.items():
        picture(1).resize(size).save(folder / "data" / name)
    write_captions(folder / "data", dict.fromkeys(sizes, "a picture"))
    source = saved(tiny_kl(), folder / "kl")
    version = encoded(project(folder, 64, source))
    rows = {row["id"]: row for row in version.table("samples").to_pylist()}
    assert rows.keys() == sizes.keys()
    buckets = {name: tuple(map(int, row["bucket"].split("x"))) for name, row in rows.items()}
    assert buckets["wide.png"][1] > buckets["wide.png"][0]
    assert buckets["tall.png"][0] > buckets["tall.png"][1]
    assert buckets["square.png"] == (64, 64, 1)
    model = load_autoencoder(source)
    for name, row in rows.items():
        height, width, _ = buckets[name]
        assert width <= sizes[name][0]  # nothing is enlarged
        assert height <= sizes[name][1]
        box = [row[f"crop_{side}"] for side in ("left", "top", "right", "bottom")]
        image = (
            Image.open(folder / "data" / name)
            .crop(box)
            .resize((width, height), Image.Resampling.LANCZOS)
        )
        direct = model.encode(to_pixels(np.asarray(image))[None])
        kept, _ = latents_of(row)
        torch.testing.assert_close(kept, direct.mean[0], rtol=1e-3, atol=1e-3)
        assert (model.decode(kept[None]) - model.decode(direct.mean)).abs().max() < 1e-2


def test_captions_in_eight_bits(folder):
    for k in range(3):
        picture(k).save(folder / "data" / f"{k}.png")
    write_captions(folder / "data", {f"{k}.png": f"picture {k} of three" for k in range(3)})
    recipe = project(folder, 16, max_aspect=1, upscale=True)
    exact = LatentReader(encoded(recipe)).batch(np.arange(3), np.zeros(3, int), 0).condition
    small = recipe.encode.model_copy(update={"text_dtype": "int8-b16"})
    version = encoded(recipe.model_copy(update={"encode": small}))
    assert version.number == 2
    before, after = (
        {entry.name: entry.digest for entry in each.manifest.texts}
        for each in (version.store.open_version(1), version)
    )
    assert before["clip"] == after["clip"]  # its pooled vectors stay as they are
    assert before["t5"] != after["t5"]
    assert set(version.table("texts")["dtype"].to_pylist()) == {"int8-b16", "float16"}
    rows = version.table("texts").to_pylist()
    assert all((row["relative_error"] is None) == (row["encoder"] == "clip") for row in rows)
    [(name, error)] = version.manifest.rounding.items()
    assert (name, error.captions) == ("t5", len(rows) // 2)
    assert 1e-4 < error.mean <= error.largest < 0.01
    assert "t5 embeddings are in 8 bits" in Path(version.store.uri, "README.md").read_text()
    near = LatentReader(version).batch(np.arange(3), np.zeros(3, int), 0).condition
    error = (near.tokens - exact.tokens).norm() / exact.tokens.norm()
    assert 0 < error < 0.01


def test_a_file_for_which_there_is_no_room_is_a_reject_and_is_not_read(folder, monkeypatch):
    """Whether its parts are found by the listing, or would be looked for in it."""
    for k in range(3):
        picture(k).save(folder / "data" / f"{k}.png")
    large = folder / "data" / "3.png"
    large.write_bytes((folder / "data" / "2.png").read_bytes() + bytes(1 << 20))
    write_captions(folder / "data", {f"{k}.png": f"picture {k}" for k in range(4)})
    read, seen = MediaReader.read, []

    def watched(self, uri: str) -> bytes:
        seen.append(uri)
        return read(self, uri)

    monkeypatch.setattr(MediaReader, "read", watched)
    # a child with so little room could not even start
    here = lambda function, *_: SimpleNamespace(decode=function)  # noqa: E731
    monkeypatch.setattr(encode_media, "_guard", here)
    for aspect in (1, 2):
        recipe = project(folder, 16, max_aspect=aspect, upscale=True, item_gib=2**-11)
        rejects = encoded(recipe).table("rejects").to_pylist()
        told = [(row["id"], row["stage"], row["reason"]) for row in rejects]
        assert told == [("3.png", "read", "too large")]
        assert rejects[0]["detail"].startswith(f"{large.stat().st_size} bytes are more than")
    assert len(seen) == 3 + 2 * 3
    assert not any(uri.endswith("3.png") for uri in seen)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1, 1, 1, 1, 1], [[0, 1, 2], [3, 4]]),
        ([6, 4, 1, 20, 1], [[0, 1], [2], [3], [4]]),
        ([20], [[0]]),
    ],
)
def test_files_are_read_ahead_by_bytes_and_number(sizes, expected):
    assert [list(some) for some in read_together(sizes, 10, 3)] == expected
