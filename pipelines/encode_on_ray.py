"""The encode job's two Ray Data pipelines: shards in, lists of written files out.

Results arrive in the order shards are finished, while others are still running.
"""

from collections.abc import Iterator
from functools import partial

import ray

from pipelines import ray_runtime
from pipelines.encode_plan import Job
from pipelines.encode_workers import EncodeImages, EncodeTexts, Row, decode_shard
from pipelines.recipes.sections import Workers


def encode_pictures(rows: list[Row], job: Job, workers: Workers, verbose: bool) -> Iterator[Row]:
    """Decode shards of pictures in CPU tasks and encode them on actors; see `decode_shard`."""
    if rows:
        # Ray Data fuses decoding with the actors if both ask for the same: so without GPUs, and
        # then actors cannot take all the CPUs and leave none to decode.
        cpus = 1 if workers.gpus else workers.cpus
        decode = partial(decode_shard, size=job.size)
        decoded = _shards(rows, workers, verbose).map(decode, num_cpus=cpus)
        yield from _on_actors(decoded, EncodeImages, len(rows), job, workers)


def embed_captions(rows: list[Row], job: Job, workers: Workers, verbose: bool) -> Iterator[Row]:
    """Embed shards of captions on actors; see `EncodeTexts`."""
    if rows:
        shards = _shards(rows, workers, verbose)
        yield from _on_actors(shards, EncodeTexts, len(rows), job, workers)


def _shards(rows: list[Row], workers: Workers, verbose: bool) -> ray.data.Dataset:
    """Start Ray and hand it the shards, one to a block."""
    ray_runtime.start(verbose)
    decoding = 1 if workers.gpus else 0  # else the actors decode
    remedy = "lower encode.workers.cpus or .gpus" + " (one more CPU decodes)" * decoding
    ray_runtime.check_room("encode", workers.cpus + decoding, workers.gpus, remedy)
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _on_actors(
    shards: ray.data.Dataset, actor: type, count: int, job: Job, workers: Workers
) -> Iterator[Row]:
    """Map the shards over a pool that grows to `workers.count`, but not beyond the shards."""
    most = min(workers.count, count)
    first = 1 if workers.gpus else most  # with GPUs the rest must leave CPUs for decoding
    results = shards.map(
        actor,
        fn_constructor_args=(job, workers.threads, workers.device),
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=first, max_size=most),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    yield from results.iter_rows()
