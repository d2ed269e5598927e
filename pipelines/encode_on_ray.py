"""The encode job's Ray Data pipelines: shards in, lists of written files out.

Results arrive in the order shards are finished, while others are still running.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial

import ray

from pipelines import ray_runtime
from pipelines.encode_groups import probe_tasks
from pipelines.encode_media import Row, decode_shard, probe_entries
from pipelines.encode_plan import Item, Job
from pipelines.encode_workers import EncodeShard
from pipelines.recipes.sections import Workers


def probe_files(
    entries: Sequence[Item], job: Job, workers: Workers, verbose: bool
) -> Iterator[Item]:
    """Find the parts of files in CPU tasks, in whatever order; see `probe_entries` and
    `probe_tasks`."""
    if entries:
        rows = [{"items": json.dumps(some)} for some in probe_tasks(entries)]
        shards = _shards(rows, workers, verbose)
        for row in shards.map(partial(probe_entries, job=job), num_cpus=1).iter_rows():
            yield from json.loads(row["items"])


def encode_shards(rows: list[Row], job: Job, workers: Workers, verbose: bool) -> Iterator[Row]:
    """Decode shards of media in CPU tasks, encode them and shards of captions on actors; see
    `decode_shard` and `EncodeShard`."""
    if rows:
        # Ray Data fuses decoding with the actors if both ask for the same: so without GPUs, and
        # then actors cannot take all the CPUs and leave none to decode.
        cpus = 1 if workers.gpus else workers.cpus
        decode = partial(decode_shard, job=job)
        decoded = _shards(rows, workers, verbose).map(decode, num_cpus=cpus)
        yield from _on_actors(decoded, len(rows), job, workers)


def _shards(rows: list[Row], workers: Workers, verbose: bool) -> ray.data.Dataset:
    """Start Ray and hand it the shards, one to a block."""
    ray_runtime.start(verbose)
    decoding = 1 if workers.gpus else 0  # else the actors decode
    remedy = "lower encode.workers.cpus or .gpus" + " (one more CPU decodes)" * decoding
    ray_runtime.check_room("encode", workers.cpus + decoding, workers.gpus, remedy)
    return ray.data.from_items(rows, override_num_blocks=len(rows))


def _on_actors(shards: ray.data.Dataset, count: int, job: Job, workers: Workers) -> Iterator[Row]:
    """Map the shards over a pool that grows to `workers.count`, but not beyond the shards."""
    most = min(workers.count, count)
    first = 1 if workers.gpus else most  # with GPUs the rest must leave CPUs for decoding
    actor: type = EncodeShard
    results = shards.map(
        actor,
        fn_constructor_args=(job, workers.threads, workers.device),
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=first, max_size=most),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    yield from results.iter_rows()
