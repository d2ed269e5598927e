"""A data set in which nearly everything is wrong: each row becomes a sample or a reject with its
reason, and no other row notices. As a folder, and as an archive with paths that lead out."""

import io
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_folder import picture, write_captions
from PIL import Image
from test_encode_media import encoded, latents_of, project
from video_files import encode as video_file
from video_files import numbered, numbers, with_duration

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.latents.verify import verify
from ldm_core.media.buckets import Bucket, fit
from ldm_core.media.decode import decode_image
from ldm_core.media.pixels import to_image
from pipelines.recipes.schema import Recipe

RATE, FRAMES = 8, 9


def saved(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A whole PNG of one bit a pixel, all of its bytes in a compressed run that ends too early."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


FILM = video_file(numbered(FRAMES, 64, 64), fps=RATE)
WEBM = video_file(numbered(FRAMES, 64, 64), "webm", fps=RATE)
GOOD = {
    **{f"good-{k}.png": saved(picture(k)) for k in range(4)},
    "wide.png": saved(Image.fromarray(np.full((8, 20_000, 3), 90, np.uint8))),
    "jpeg-by-its-bytes.png": saved(picture(9), "JPEG"),
    "good.mp4": FILM,
    "says-a-thousand-times.mp4": with_duration(FILM, "mp4", 1000),
    "says-a-tenth.webm": with_duration(WEBM, "webm", 0.1),
}
BAD = {
    "bomb.png": (png_of_size(200_000, 200_000), "too large"),
    "empty.png": (b"", "empty file"),
    "empty.mp4": (b"", "empty file"),
    "half.png": (saved(picture(5))[:300], "truncated"),
    "half.jpg": (saved(picture(5), "JPEG")[:300], "truncated"),
    "half.mp4": (FILM[: len(FILM) // 2], "truncated"),
    "half.webm": (WEBM[: len(WEBM) // 2], "truncated"),
    "words.jpg": (b"a text file", "not an image"),
    "film.png": (FILM, "not an image"),
    "picture.mp4": (saved(picture(6)), "not a video"),
    "no-frames.mp4": (
        video_file([], size=(64, 64), file_options={"movflags": "empty_moov"}),
        "no frames",
    ),
    "no-stream.mp4": (video_file([], size=(64, 64)), "no video stream"),
    "no-frames.webm": (video_file([], "webm", size=(64, 64)), "no frames"),
}
FILES = GOOD | {name: data for name, (data, _) in BAD.items()}


def put_folder(place: Path) -> dict[str, str]:
    """Everything as loose files, and links and captions that lead astray."""
    for name, data in FILES.items():
        (place / name).write_bytes(data)
    (place / "loop.png").symlink_to("loop.png")
    (place / "out.png").symlink_to("/etc/passwd")
    (place / "deeper").mkdir()
    (place / "deeper" / "up").symlink_to(place)
    (place / "uncaptioned.png").write_bytes(saved(picture(7)))
    named = [*FILES, "loop.png", "out.png", "gone.png", "../escape.png"]
    write_captions(place, {name: f"the file {name}" for name in named})
    return {
        "loop.png": "symlink loop",
        "out.png": "symlink outside folder",
        "uncaptioned.png": "no caption",
        "gone.png": "file missing",
        "../escape.png": "path outside folder",
    }


def put_archive(place: Path) -> dict[str, str]:
    """Everything in one tar, and members that would be written elsewhere."""
    astray = ["../escape.png", "/abs.png", "deeper/../../up.png"]
    with tarfile.open(place / "all.tar", "w") as archive:
        for name, data in FILES.items():
            key = name.replace(".", "-")
            put_member(archive, key + Path(name).suffix, data)
            put_member(archive, f"{key}.txt", f"the file {name}".encode())
        for name in astray:
            put_member(archive, name, saved(picture(7)))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    ids = [f"all.tar/{name.lstrip('/')}" for name in (*astray, "link.png")]
    return dict.fromkeys(ids, "unsafe path")


def put_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def in_archive(name: str) -> str:
    return f"all.tar/{name.replace('.', '-')}"


@pytest.fixture(params=["folder", "archive"])
def hostile(request, tmp_path: Path) -> tuple[Recipe, dict[str, str], dict[str, str]]:
    """(recipe, id -> file of the good ones, id -> reason of the others)."""
    (tmp_path / "data").mkdir()
    put, id_of = {"folder": (put_folder, str), "archive": (put_archive, in_archive)}[request.param]
    astray = put(tmp_path / "data")
    good = {id_of(name): name for name in GOOD}
    bad = {id_of(name): reason for name, (_, reason) in BAD.items()}
    return project(tmp_path, 32, frames=FRAMES, fps=RATE, max_reject_share=1), good, bad | astray


def test_every_row_is_a_sample_or_a_reject_with_its_reason(hostile):
    recipe, good, bad = hostile
    before = sorted(os.listdir(Path(recipe.data).parent))
    version = encoded(recipe)
    samples, rejects = (version.table(name).to_pylist() for name in ("samples", "rejects"))

    assert {row["id"]: row["reason"] for row in rejects} == bad
    assert {row["source_id"] for row in samples} == set(good)
    assert len(samples) == len(good)
    assert len(rejects) == len(bad)
    counts = version.manifest.counts
    assert counts["samples"] + counts["rejects"] == len(good) + len(bad)
    assert all(check.failed == 0 for check in verify(version, autoencoder_facts("identity")))
    assert set(os.listdir(Path(recipe.data).parent)) - set(before) == {"root"}

    for row in samples:
        assert_stored(row, good[row["source_id"]])


def assert_stored(row: dict, name: str) -> None:
    pixels, _ = latents_of(row)  # the identity's latents
    bucket = Bucket.parse(row["bucket"])
    assert max(bucket.height, bucket.width) <= 2 * min(bucket.height, bucket.width)
    assert row["captions"][0]["caption"] == f"the file {name}"
    if row["media"] == "video":
        assert (row["start_s"], row["frames"]) == (0, FRAMES)
        assert numbers(to_image(pixels.transpose(0, 1))) == list(range(FRAMES))
    else:
        assert np.array_equal(to_image(pixels), fit(decode_image(GOOD[name]), bucket)[0])
