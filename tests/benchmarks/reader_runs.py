"""Stores for readers to be measured on, on a disk or on an S3 server, and our reader's rate."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import bucket_store as bucket_store_module
import numpy as np
import torch
from bucket_store import bucket_store
from small_store import text_rows

from ldm_core.files import filesystem
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.index import index_store
from ldm_core.reading.stream import StreamReader
from ldm_core.training.prefetch import prefetch
from pipelines.ray_runtime import worker_environment

MIB = 2**20
WORDS = ("a", "red", "old", "house", "by", "the", "sea", "with", "two", "dogs", "and", "clouds")


def make_store(uri: str, shape: tuple[int, ...], samples: int, logvar: float) -> StoreVersion:
    """Shards of 1024 random latents, each with a caption of its own of 8 to 40 tokens of 64."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(WORDS, rng.integers(8, 41))) + f" {k}" for k in range(samples)]
    bucket = f"{shape[-2]}x{shape[-1]}x1"
    bucket_store_module.text_rows = lambda text: text_rows(text, width=64, pooled=64)
    return bucket_store(
        uri,
        {bucket: samples},
        group=1024,
        logvar=logvar,
        captions=captions,
        statistics=None,
        texts_of=1024,
        shapes={bucket: shape},
    )


def as_a_worker() -> None:
    """Begin again with the memory settings of `ldm train`'s workers, which are read at the start:
    without them every batch faults its memory in anew, whoever makes it.
    """
    wanted = {k: v for k, v in worker_environment().items() if k.startswith("MALLOC_")}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})


@contextmanager
def moto() -> Iterator[str]:
    """A bucket on a server of its own."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], **quiet)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    try:
        for _ in range(100):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        filesystem("s3://bench")[0].mkdir("bench")
        yield "s3://bench"
    finally:
        server.terminate()
        server.wait()


def rate(batches: Iterator[int], seconds: float) -> tuple[float, float]:
    """Samples a second, once the first batch is there, and this process's CPU seconds a sample."""
    next(batches)
    begin, used, count = time.perf_counter(), time.process_time(), 0
    for size in batches:
        count += size
        if time.perf_counter() - begin > seconds:
            break
    return count / (time.perf_counter() - begin), (time.process_time() - used) / count


def stream(version: StoreVersion, batch: int, threads: int, window: int) -> Iterator[int]:
    """Ours, on one worker."""
    reader = StreamReader(
        [index_store(version)],
        seed=0,
        lanes=1,
        budget=batch,
        tokens=lambda _: 1,
        window_bytes=window,
        threads=threads,
    )
    with reader:
        for _, (found,) in prefetch(reader.batches, 0, 10**9, ahead=4, threads=threads):
            assert found.latents.dtype == torch.float32
            yield len(found)
