"""What a dry run predicts of bytes and samples, against what the run then makes; hours are measured
by `make bench-encode`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_folder import write_captions
from PIL import Image
from test_encode_media import encoded, project, put_videos

from ldm_core.errors import UserError
from ldm_core.latents.store import LatentStore
from ldm_core.media.entries import Listing
from ldm_core.media.manifest_sample import Sampled
from pipelines import encode_estimate, encode_latents
from pipelines.encode_estimate import estimate, evenly
from pipelines.encode_foretold import Estimate
from pipelines.encode_latents import MEASURED
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import EncodeSection, Workers
from pipelines.stage import Options

WORDS = ("a", "red", "old", "house", "by", "the", "sea", "with", "two", "dogs", "and", "clouds")


def predicted(recipe: Recipe, count: int = MEASURED) -> Estimate:
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    found = estimate(plan, LatentStore(plan.job.store), recipe.encode, count)
    assert found
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


def put_pictures(folder: Path, count: int) -> None:
    """Noise of all strengths, which compresses to files and latents of all sizes."""
    rng, captions = np.random.default_rng(0), {}
    for k in range(count):
        pixels = 128 + rng.normal(size=(32, 32, 3)) * rng.uniform(0, 60)
        name = f"{k:04d}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "data" / name)
        captions[name] = " ".join(rng.choice(WORDS, rng.integers(4, 40)))
    write_captions(folder / "data", captions)


@pytest.mark.parametrize("dtype", ["float16", "int8-b16"])
def test_bytes_of_a_run_twenty_times_as_large(folder, dtype):
    count = 16
    put_pictures(folder, 20 * count)
    recipe = project(folder, 32, max_aspect=1, text_dtype=dtype)
    before = predicted(recipe, count)
    manifest = encoded(recipe).manifest
    assert (before.files, before.measured, before.samples) == (20 * count, count, 20 * count)
    assert before.bytes == pytest.approx(manifest.bytes, rel=0.2)
    print(f"bytes predicted / made: {before.bytes / manifest.bytes:.3f}")


def test_samples_of_videos_are_their_clips(folder):
    put_videos(folder, a=34, b=34, c=34, d=34)
    recipe = project(folder, 32, frames=17, fps=8)
    before = predicted(recipe, 2)
    assert (before.files, before.measured, before.samples) == (4, 2, 8)
    assert encoded(recipe).manifest.counts["samples"] == 8


def test_nothing_new_takes_nothing(folder):
    put_pictures(folder, 3)
    recipe = project(folder, 32, max_aspect=1)
    encoded(recipe)
    plan = make_plan(recipe.located(), describe_autoencoder(recipe.located()))
    assert estimate(plan, LatentStore(plan.job.store), recipe.encode, MEASURED) is None


def test_new_captions_alone_take_time_and_bytes(folder):
    put_pictures(folder, 3)
    recipe = project(folder, 32, max_aspect=1)
    encoded(recipe)
    shorter = recipe.text.model_copy(update={"max_tokens": 4})
    found = predicted(recipe.model_copy(update={"text": shorter}))
    assert (found.files, found.samples, found.decode_s, found.encode_s) == (0, 0, 0, 0)
    assert found.text_s > 0
    assert found.bytes > 0
    assert "captions 100 %" in found.lines(recipe.encode)[0]


def test_what_a_listing_tells_is_not_probed(folder, monkeypatch):
    put_pictures(folder, 3)
    monkeypatch.setattr(encode_estimate, "probe_entries", None)
    assert predicted(project(folder, 32, max_aspect=1, upscale=True)).samples == 3


@pytest.mark.parametrize(("there", "count"), [(1, 4), (5, 4), (7, 4), (63, 32)])
def test_the_measured_are_spread_over_all(there, count):
    found = evenly(range(there), count)
    assert len(found) == len(set(found)) == min(there, count)
    assert found[0] == 0
    assert found[-1] >= there - 1 - there // len(found)


SIZES = {"media_bytes": 7.0, "text_bytes": 3.0, "captions": 5.0}
FEW = Sampled(Listing([], []), 100, 10**9, captions=5, lone=0)


def test_of_captions_that_all_come_again_there_are_no_more():
    whole = Estimate(100, 100, 1.0, 1.0, 1.0, **SIZES, measured=2, rejects={}).of_all(FEW)
    assert (whole.files, whole.samples, whole.media_bytes) == (10**9, 1e9, 7e7)
    assert (whole.captions, whole.text_bytes, whole.text_s) == (5, 3, 1)
    assert whole.bytes == 7e7 + 3
    assert "3 for the embeddings of at most 5 captions" in "".join(whole.lines(EncodeSection()))


def test_captions_of_which_no_two_are_alike_grow_with_the_rows():
    distinct = replace(FEW, captions=100, lone=100)
    whole = Estimate(100, 100, 1.0, 1.0, 1.0, **SIZES, measured=2, rejects={}).of_all(distinct)
    assert (whole.text_s, whole.text_bytes) == (pytest.approx(1e7), pytest.approx(3e7))


def test_beside_gpus_decoding_is_no_work_of_theirs():
    hour = {"decode_s": 3600.0, "encode_s": 1800.0, "text_s": 1800.0} | SIZES
    section = EncodeSection(workers=Workers(count=2, gpus=1), worker_hour_price=3)
    beside = Estimate(4, 4, **hour, measured=2, rejects={}, apart=True)
    assert beside.worker_hours == 1
    first, second, *_ = beside.lines(section)
    assert first.split(maxsplit=2)[2] == (
        "1 (encode 50 %, captions 50 %), 3.00 at 3 each; "
        "0.508 hours by 2 workers, with about 30 s to start"
    )
    assert second.split() == [
        "takes",
        "CPU-hours",
        *["1", "of", "decoding,", "beside", "the", "workers"],
    ]
    assert Estimate(4, 4, **hour, measured=2, rejects={}).worker_hours == 2


def test_a_machine_without_a_gpu_cannot_tell_what_gpus_take(folder, monkeypatch):
    put_pictures(folder, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="run it on one of the machines that are to encode"):
        predicted(project(folder, 32, max_aspect=1, workers={"gpus": 1}))


@pytest.mark.parametrize(
    ("workers", "at_once"),
    [
        ({"count": 2}, 2),
        ({"count": 9}, 4),
        ({"count": 9, "cpus": 2}, 2),
        ({"cpus": 9}, 1),
        ({"count": 4, "gpus": 1}, 1),
    ],
)
def test_as_many_are_measured_at_once_as_there_are_workers_and_cores(workers, at_once, monkeypatch):
    """Each waits for the others."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(4))
    assert len(encode_estimate.at_once(Workers(**workers))) == at_once
    together, met = Barrier(at_once, timeout=60), []
    each = [lambda k: met.append(together.wait()) or k] * at_once
    seconds, result = encode_estimate._timed_each(each, 5)
    assert (seconds > 0, result) == (True, 5)
    assert sorted(met) == list(range(at_once))


def test_of_a_long_manifest_some_rows_are_looked_at(folder, monkeypatch, capsys):
    put_pictures(folder, 40)
    rows = [json.loads(line) for line in (folder / "data/captions.jsonl").read_text().splitlines()]
    table = pa.table({"file": [f"{folder}/data/{row['file']}" for row in rows],
                      "caption": [row["caption"] for row in rows]})  # fmt: skip
    pq.write_table(table, folder / "rows.parquet", row_group_size=4)
    recipe = project(folder, 32, max_aspect=1)
    recipe = recipe.model_copy(update={"data": str(folder / "rows.parquet")})
    whole = predicted(recipe)
    monkeypatch.setattr(encode_latents, "MOST_LISTED", 20)
    encode_latents.encode(recipe, Options(dry_run=True))
    printed = capsys.readouterr().out
    [told] = re.findall(r"bytes +([\d,]+) for 40 samples", printed)
    assert float(told.replace(",", "")) == pytest.approx(whole.bytes, rel=0.2)
    assert "20 of 40 that are new or changed, in this process; 20 rows were looked at" in printed
    assert "not all rows were looked at" in printed
    assert not Path(recipe.product("latents")).exists()
