"""The encoders of a recipe alone, by the clock and by CPU time: in one process, and in several."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.text.encoders import load_clip, load_t5
from pipelines.recipes.schema import Recipe

MAX_TOKENS = 128
BATCHES = (1, 2, 4, 8, 16)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class Bare:
    """The encoders alone, on tensors that are ready."""

    def __init__(self, recipe: Recipe, captions: list[str], pixels: torch.Tensor) -> None:
        dtype = torch.bfloat16 if recipe.encode.precision == "bf16" else torch.float32
        uri = recipe.autoencoder_uri
        self.autoencoder = load_autoencoder(uri, channels_last=True, dtype=dtype)
        self.texts = [load_t5(recipe.t5_uri, MAX_TOKENS), load_clip(recipe.clip_uri, MAX_TOKENS)]
        self.captions, self.pixels = captions, pixels

    def work(self, batch: int, count: int) -> None:
        for start in range(0, count, batch):
            self.autoencoder.encode(self.pixels[start : start + batch])
            for encoder in self.texts:
                encoder.encode(self.captions[start : start + batch])

    def best(self, threads: int, clock: int) -> tuple[int, float]:
        """The best batch size, and its seconds a picture by one of the clocks of `timed`."""
        torch.set_num_threads(threads)
        self.work(2, 2)
        tried = {b: timed(lambda b=b: self.work(b, BATCHES[-1]))[clock] for b in BATCHES}
        batch = min(tried, key=lambda one: tried[one])
        print(f"bare, {threads} threads: best batch {batch} of {list(tried)}", flush=True)
        count = len(self.pixels)
        return batch, timed(lambda: self.work(batch, count))[clock] / count


def bare_beside(
    recipe: Recipe, captions: list[str], pixels: torch.Tensor, batch: int, workers: int
) -> float:
    """CPU seconds a picture of the encoders in as many processes at once as the job has workers,
    one thread each: busy cores share caches and memory, and slow each other."""
    context = multiprocessing.get_context("spawn")
    told = (recipe, captions, pixels.numpy(), batch)
    with ProcessPoolExecutor(workers, context, _gather, (context.Barrier(workers),)) as pool:
        tasks = [pool.submit(_beside, *told) for _ in range(workers)]
        return sum(task.result() for task in tasks) / workers


_GATHERED: list = []  # the barrier at which this process waits for the others


def _gather(barrier: object) -> None:
    _GATHERED.append(barrier)


def _beside(recipe: Recipe, captions: list[str], pixels: np.ndarray, batch: int) -> float:
    torch.set_num_threads(1)
    encoders = Bare(recipe, captions, torch.from_numpy(pixels))
    encoders.work(batch, batch)
    _GATHERED[0].wait(timeout=300)  # so that a process that failed is told, and not waited for
    return timed(lambda: encoders.work(batch, len(pixels)))[1] / len(pixels)
