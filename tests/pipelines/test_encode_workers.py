"""The callables that encode pictures on Ray, without Ray."""

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from picture_folder import SIZE, picture_folder
from test_encode_media import saved, tiny_kl

from ldm_core.autoencoders.autoencoder import IdentityAutoencoder, Posterior
from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from ldm_core.media.buckets import Bucket, Geometry
from ldm_core.media.locators import MediaReader
from ldm_core.media.parts import ClipRule
from pipelines import encode_files, encode_workers
from pipelines.encode_media import decode_shard, probe_entries
from pipelines.encode_plan import Job
from pipelines.encode_results import parts_of
from pipelines.encode_workers import EncodeMedia
from pipelines.recipes.sections import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def job(tmp_path) -> Iterator[Job]:
    LatentStore(str(tmp_path / "store")).create()
    threads = torch.get_num_threads()
    geometry = Geometry(SIZE, 1, max_aspect=1, upscale=True)
    rule = ClipRule(8, 17, None, 1, False)
    yield Job(str(tmp_path / "store"), geometry, rule, 3, "identity", "", "", 8)
    torch.set_num_threads(threads)


def shard(folder: Path, *names: str) -> dict[str, str]:
    items = [
        {"id": f"{k} {name}", "source": f"{k} {name}", "part": 0, "parts": 1, "kind": "image",
         "uri": str(folder / name), "captions": [["x", 1.0]], "fingerprint": "f"}
        for k, name in enumerate(names)
    ]  # fmt: skip
    return {"shard": "s", "bucket": f"{SIZE}x{SIZE}x1", "items": json.dumps(items)}


def test_decoding_keeps_bad_files_in_the_row(data, job):
    names = ["001.png", "text.jpg", "002.png"]
    row = decode_shard(shard(data, *names), job)
    items = json.loads(row["items"])
    reasons = [item.get("reason") for item in items]
    assert reasons == [None, "not an image", None]
    assert len(row["pixels"]) == 2 * SIZE * SIZE * 3


def test_more_files_than_are_read_at_once(data, job):
    names = [path.name for path in sorted(data.glob("0*.png"))] * 3
    assert len(names) > encode_files.READS_IN_FLIGHT
    row = decode_shard(shard(data, *names), job)
    assert len(row["pixels"]) == len(names) * SIZE * SIZE * 3


@pytest.mark.parametrize(
    ("raised", "seen", "told"),
    [
        (ConnectionError("the store is down"), ConnectionError, "down"),
        (
            PermissionError("the key has expired"),
            UserError,
            r"001\.png was listed .*PermissionError",
        ),
        (FileNotFoundError("no such disk here"), UserError, r"001\.png was listed .*FileNotFound"),
    ],
)
def test_an_outage_is_not_a_bad_file(data, job, monkeypatch, raised, seen, told):
    def down(self, uri: str) -> bytes:
        raise raised

    monkeypatch.setattr(MediaReader, "read", down)
    with pytest.raises(seen, match=told):
        decode_shard(shard(data, "001.png"), job)


class TestUnreadable:
    """Files that are listed, and of which the storage gives no bytes."""

    @pytest.fixture
    def folder(self, data: Path, tmp_path: Path) -> Path:
        """A good file, one that is gone, and a directory where a file was."""
        (tmp_path / "data" / "002.png").mkdir(parents=True)
        shutil.copy(data / "001.png", tmp_path / "data")
        return tmp_path / "data"

    def test_what_others_of_the_shard_can_is_a_reject(self, folder, job):
        row = decode_shard(shard(folder, "gone.png", "001.png", "002.png"), job)
        told = [(i.get("stage"), i.get("reason")) for i in json.loads(row["items"])]
        assert told == [("read", "file missing"), (None, None), ("read", "unreadable")]
        assert len(row["pixels"]) == SIZE * SIZE * 3

    def test_one_that_never_answers_while_others_do_is_a_reject(self, folder, job, monkeypatch):
        read = MediaReader.read

        def broken(self, uri: str) -> bytes:
            if uri.endswith("gone.png"):
                raise ConnectionError("500, again and again")
            return read(self, uri)

        monkeypatch.setattr(MediaReader, "read", broken)
        row = decode_shard(shard(folder, "gone.png", "001.png"), job)
        [broken_one, good] = json.loads(row["items"])
        assert (broken_one["reason"], good.get("reason")) == ("unreadable", None)
        assert "500, again and again" in broken_one["detail"]

    def test_what_others_of_the_source_can_is_a_reject(self, folder, job):
        alone = shard(folder, "002.png")
        job = replace(job, witnesses=(str(folder / "gone.png"), str(folder / "001.png")))
        [item] = json.loads(decode_shard(alone, job)["items"])
        assert (item["stage"], item["reason"]) == ("read", "unreadable")
        assert "IsADirectoryError" in item["detail"]

    def test_where_none_can_be_read_the_job_stops(self, folder, job):
        job = replace(job, witnesses=(str(folder / "gone.png"), str(folder / "002.png")))
        with pytest.raises(UserError, match=r"002\.png was .*IsADirectoryError\), nor others"):
            decode_shard(shard(folder, "002.png", "gone.png"), job)

    def test_of_other_storage_nothing_follows(self, folder, job):
        job = replace(job, witnesses=(f"memory://bucket/{folder}/001.png",))
        with fsspec.open(job.witnesses[0], "wb") as file:
            file.write(b"some")
        with pytest.raises(UserError, match="nor others"):
            decode_shard(shard(folder, "gone.png"), job)

    def test_when_it_is_looked_into_too(self, folder, job):
        entries = json.loads(shard(folder, "gone.png", "001.png", "002.png")["items"])
        told = json.loads(probe_entries({"items": json.dumps(entries)}, job)["items"])
        assert [item.get("reason") for item in told] == ["file missing", None, "unreadable"]

    def test_a_machine_without_descriptors_is_no_bad_file(self, folder, job, monkeypatch):
        def none_left(self, uri: str) -> bytes:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(MediaReader, "read", none_left)
        job = replace(job, witnesses=(str(folder / "001.png"),))
        with pytest.raises(OSError, match="Too many open files"):
            decode_shard(shard(folder, "002.png"), job)


def test_a_non_finite_latent_is_a_reject(data, job, monkeypatch):
    class Broken(IdentityAutoencoder):
        def encode(self, pixels: torch.Tensor) -> Posterior:
            mean = pixels.clone()
            mean[1] = float("nan")
            return Posterior(mean, torch.zeros_like(mean))

    monkeypatch.setattr(encode_workers, "load_autoencoder", lambda *_: Broken())
    row = decode_shard(shard(data, "001.png", "002.png", "003.png"), job)
    parts = parts_of(EncodeMedia(job, threads=1, device="cpu")(row))
    assert {part.table: part.rows for part in parts} == {"samples": 2, "rejects": 1}
    store = LatentStore(job.store)
    for part in parts:
        store.commit(part.table, [part], "s")
    [reject] = store.table("rejects").to_pylist()
    assert (reject["id"], reject["reason"]) == ("1 002.png", "non-finite latent")


def test_a_gpu_that_was_not_asked_for_is_left_alone(job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (Workers().device, Workers(gpus=0.5).device) == ("cpu", "cuda")
    assert EncodeMedia(job, Workers().threads, Workers().device).device == "cpu"


def test_batches_do_not_change_the_rows(data, job, tmp_path):
    """Of an autoencoder that computes: the identity cannot tell batches apart."""
    job = replace(job, autoencoder=saved(tiny_kl(), tmp_path / "kl"))
    names = [path.name for path in sorted(data.glob("0*.png"))]
    row = decode_shard(shard(data, *names), job)
    rows = []
    for size in (1, 3, 7):
        [part] = parts_of(EncodeMedia(replace(job, batch_size=size), threads=1, device="cpu")(row))
        rows.append(pq.read_table(f"{job.store}/samples/{part.path}").to_pylist())
    assert len(rows[0]) == len(names)
    assert rows[0] == rows[1] == rows[2]


class Narrow(IdentityAutoencoder):
    """Has room for so many pixels at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.seen = room, list[int]()

    def encode(self, pixels: torch.Tensor) -> Posterior:
        frames = pixels[:, 0].numel()
        self.seen.append(frames // (SIZE * SIZE))
        if frames > self.room:
            raise torch.OutOfMemoryError
        return super().encode(pixels)


def test_a_batch_without_room_is_halved_and_so_are_those_after_it(data, job, monkeypatch):
    names = [path.name for path in sorted(data.glob("0*.png"))][:14]
    row = decode_shard(shard(data, *names), job)
    expected, _ = EncodeMedia(job, threads=1, device="cpu").rows(row)
    narrow = Narrow(3 * SIZE * SIZE)
    monkeypatch.setattr(encode_workers, "load_autoencoder", lambda *_: narrow)
    encoder = EncodeMedia(replace(job, batch_size=11), threads=1, device="cpu")
    found, rejects = encoder.rows(row)
    assert (found, rejects) == (expected, [])
    assert narrow.seen == [11, 5, *7 * [2]]
    narrow.seen.clear()
    encoder.rows(row)
    assert narrow.seen == 7 * [2]


def test_a_picture_without_room_is_told(data, job, monkeypatch):
    row = decode_shard(shard(data, "001.png", "002.png"), job)
    monkeypatch.setattr(encode_workers, "load_autoencoder", lambda *_: Narrow(0))
    with pytest.raises(UserError, match="cpu has no room to encode a sample of 16x16x1"):
        EncodeMedia(job, threads=1, device="cpu").rows(row)


def test_a_gpus_batches_are_bounded_by_pixels(job, monkeypatch):
    monkeypatch.setattr(encode_workers, "load_autoencoder", lambda *_: Narrow(0))
    encoder = EncodeMedia(replace(job, batch_size=64), threads=1, device="cuda")
    sizes = [(256, 256, 1), (1024, 1024, 1), (1024, 1024, 5), (4096, 4096, 1)]
    assert [encoder.at_once(Bucket(*size)) for size in sizes] == [64, 8, 1, 1]


def test_frames_that_are_pictures_are_no_more_at_once_than_a_batch(job, monkeypatch):
    seen: list[int] = []

    class Watched(IdentityAutoencoder):
        def encode(self, pixels: torch.Tensor) -> Posterior:
            seen.append(len(pixels))
            return super().encode(pixels)

    monkeypatch.setattr(encode_workers, "load_autoencoder", lambda *_: Watched())
    clip = torch.rand(1, 5, 3, 16, 16)
    expected = clip.transpose(1, 2)
    for tile, sizes in ((None, [3, 2]), (8, 5 * 9 * [1])):
        seen.clear()
        encoder = EncodeMedia(replace(job, tile=tile), threads=1, device="cpu")
        mean = encoder._posterior(clip).mean
        assert seen == sizes
        torch.testing.assert_close(mean, expected)
