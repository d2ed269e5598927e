"""A set whose decoded pixels are many times what Ray's object store holds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from diffusers import AutoencoderTiny
from picture_folder import write_captions
from PIL import Image
from test_encode_media import project, saved

from ldm_core.latents.store import LatentStore
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers

STORE = 80 * 2**20  # the least that Ray takes is 75 MiB
SIZE, COUNT = 1024, 288
PIXELS = 3 * SIZE * SIZE * COUNT

# Decoding and encoding are stages of their own where there are GPUs: Ray is told of one, and the
# actors that get a share of it compute on the CPU.
JOB = f"""
import sys

import ray
from pipelines import ray_runtime
from pipelines.encode_latents import encode
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import Workers
from pipelines.stage import Options

ray.init("local", num_cpus=2, num_gpus=1, object_store_memory={STORE}, include_dashboard=False,
         log_to_driver=False, runtime_env={{"env_vars": ray_runtime.worker_environment()}})
ray_runtime.quiet(False)
Workers.device = "cpu"
encode(Recipe.model_validate_json(sys.argv[1]), Options())
"""


def tiny() -> AutoencoderTiny:
    """Eight pixels for a latent, and hardly any work."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )


def project_of(folder: Path, count: int) -> Recipe:
    """Pictures of large even squares: small files, many pixels."""
    (folder / "data").mkdir(parents=True)
    names = [f"{k:04d}.jpg" for k in range(count)]
    rng = np.random.default_rng(0)
    for name in names:
        few = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        few.resize((SIZE, SIZE), Image.Resampling.NEAREST).save(folder / "data" / name)
    write_captions(folder / "data", dict.fromkeys(names, "squares"))
    recipe = project(folder, SIZE, saved(tiny(), folder / "vae"), max_aspect=1, upscale=True)
    workers = Workers(count=1, cpus=1, gpus=0.5)
    section = {"shard_mib": 12, "workers": workers, "batch_size": 1}
    return recipe.model_copy(update={"encode": recipe.encode.model_copy(update=section)})


def run(recipe: Recipe) -> dict[str, float]:
    """Encode it; the most memory each kind of process took."""
    clean = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, recipe.model_dump_json()],
        env=clean | {"PYTHONPATH": os.getcwd()},
    )
    most = peaks(job)
    assert job.returncode == 0
    return most


def peaks(job: subprocess.Popen) -> dict[str, float]:
    """The most memory that a process of each name had for itself, MiB, while the job ran."""
    most: dict[str, float] = {}
    while job.poll() is None:
        for process in _family(job.pid):
            try:
                name = os.path.basename((process.cmdline() or [process.name()])[0])
                info = process.memory_info()
            except psutil.Error:
                continue
            most[name] = max(most.get(name, 0.0), (info.rss - info.shared) / 2**20)
        time.sleep(0.2)
    return most


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


@pytest.mark.ray
@pytest.mark.slow
def test_ten_times_the_object_store_takes_no_more_memory_than_half_of_it(tmp_path):
    assert PIXELS > 10 * STORE
    small = run(project_of(tmp_path / "small", COUNT // 24))
    recipe = project_of(tmp_path / "large", COUNT)
    large = run(recipe)
    print(f"MiB for {COUNT // 24} pictures {small}")
    print(f"MiB for {COUNT} pictures {large}")
    assert LatentStore(recipe.product("latents")).open_version().manifest.counts["samples"] == COUNT
    largest = max(small.values())  # for a process that was too short-lived to be seen there
    grown = {name: most - small.get(name, largest) for name, most in large.items()}
    assert {name: more for name, more in grown.items() if more >= PIXELS / 2**20 / 8} == {}
