"""kill -9 of the driver, of workers and of the raylet, again and again, in the middle of an encode.

The published version must be that of an undisturbed run, and what was committed is not made again.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from picture_folder import write_captions
from PIL import Image
from test_encode_media import cells, project, saved, tiny_kl
from tiny_runs import encode_here

from ldm_core.autoencoders.autoencoder import autoencoder_facts
from ldm_core.latents.store import LatentStore
from ldm_core.latents.verify import verify
from pipelines.recipes.schema import Recipe

KILLS, PICTURES, SHARD = 21, 1600, 4
FIRST = 50  # files that are looked into before some are encoded, then 100, ...
SHAPES = ((16, 16), (12, 22), (22, 12), (30, 20))
PATIENCE_S = 400  # after which something hangs: a busy machine starts a job in minutes


def processes(driver: subprocess.Popen, victim: str) -> list[psutil.Process]:
    """The driver, or its Ray's raylet or busy workers."""
    here = psutil.Process(driver.pid)
    if victim == "driver":
        return [here]
    named = {"raylet": "raylet", "worker": "ray::Map"}[victim]
    return [child for child in here.children(recursive=True) if _title(child).startswith(named)]


def _title(process: psutil.Process) -> str:
    try:
        return os.path.basename((process.cmdline() or [""])[0])
    except psutil.Error:
        return ""


def run(recipe: Recipe) -> subprocess.Popen:
    script = (
        f"from pipelines import encode_rounds; encode_rounds.FIRST_FILES = {FIRST}; "
        "import sys; from pipelines.encode_latents import encode; "
        "from pipelines.recipes.schema import Recipe; from pipelines.stage import Options; "
        "encode(Recipe.model_validate_json(sys.argv[1]), Options())"
    )
    words = [sys.executable, "-c", script, recipe.model_dump_json()]
    clean = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(words, env=clean | {"PYTHONPATH": os.getcwd()}, start_new_session=True)


def bury(driver: subprocess.Popen, family: list[psutil.Process]) -> None:
    """End what a dead driver or raylet has left running."""
    for process in [*family, psutil.Process(driver.pid)] if driver.poll() is None else family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    driver.wait(PATIENCE_S)


def committed(store: LatentStore) -> set[str]:
    """Files of the table; none before it is there."""
    return (
        set(store.open("samples").file_uris())
        if Path(store.uri, "samples/_delta_log").exists()
        else set()
    )


def disturbed(recipe: Recipe, rng: random.Random, store: LatentStore) -> Iterator[str]:
    """Kill one process after another; yields who it was. At the end none of the job is left."""
    driver, done = run(recipe), 0
    while done < KILLS:
        await_progress(driver, store)
        family = descendants(driver)
        time.sleep(rng.uniform(0, 0.3))
        victim = rng.choice(["driver", "raylet", "worker", "worker"])
        found = processes(driver, victim) if driver.poll() is None else []
        assert driver.poll() != 0, "all was encoded before all kills were done"
        if found:
            rng.choice(found).send_signal(signal.SIGKILL)
            done += 1
            print(f"killed a {victim} at {len(committed(store))} shards", flush=True)
            yield victim
        if victim != "worker" or driver.poll() is not None:
            bury(driver, family)
            driver = run(recipe)
    bury(driver, descendants(driver))


def await_progress(driver: subprocess.Popen, store: LatentStore) -> None:
    """Until another commit is in the log of samples; looking is cheap, two cores are few."""
    log = Path(store.uri, "samples/_delta_log")
    before, deadline = len(list(log.glob("*.json"))), time.monotonic() + PATIENCE_S
    while driver.poll() is None and len(list(log.glob("*.json"))) == before:
        assert time.monotonic() < deadline, "no shard is committed"
        time.sleep(0.02)


def descendants(driver: subprocess.Popen) -> list[psutil.Process]:
    return [] if driver.poll() is not None else psutil.Process(driver.pid).children(recursive=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "data").mkdir()
    names = [f"{k:04d}.png" for k in range(PICTURES)]
    for k, name in enumerate(names):
        shape = (*SHAPES[k % len(SHAPES)], 3)
        pixels = np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    for name in names[::40]:
        (tmp_path / "data" / name).write_bytes(b"broken")
    write_captions(tmp_path / "data", {name: f"picture {k % 397}" for k, name in enumerate(names)})
    source = saved(tiny_kl(), tmp_path / "kl")
    settings = {"max_aspect": 2, "upscale": True, "shard_size": SHARD}
    return project(tmp_path, 16, source, **settings)


@pytest.mark.ray
@pytest.mark.slow
def test_twenty_kills_change_nothing(recipe, tmp_path):
    rng, store, seen, kept = random.Random(0), LatentStore(recipe.product("latents")), Counter(), []
    for victim in disturbed(recipe, rng, store):
        seen[victim] += 1
        kept.append(committed(store))
    assert seen.total() == KILLS
    final = run(recipe)
    assert final.wait(600) == 0
    print(f"kills: {dict(seen)}")
    assert min(seen.values()) >= 3
    live = committed(store)
    assert all(files <= live for files in kept), "a committed shard was made again"
    written = {str(path) for path in Path(store.uri, "samples").glob("*.parquet")}
    print(
        f"{len(live)} shards live, {len(written - {*map(_path, live)})} written but not committed"
    )

    version = store.open_version()
    ids = [*version.table("samples")["id"].to_pylist(), *version.table("rejects")["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == PICTURES
    checks = verify(version, autoencoder_facts(recipe.autoencoder.source))
    assert [check for check in checks if check.failed] == []
    text = recipe.text.model_copy(update={"t5": recipe.t5_uri, "clip": recipe.clip_uri})
    calm = recipe.model_copy(update={"root": str(tmp_path / "calm"), "text": text})
    record = encode_here(calm)
    assert record.summary["content"] == version.manifest.content
    undisturbed = LatentStore(calm.product("latents")).open_version()
    for table in ("texts", "rejects"):  # of which the content does not tell
        assert cells(version, table) == cells(undisturbed, table)


def _path(uri: str) -> str:
    return uri.removeprefix("file://")
