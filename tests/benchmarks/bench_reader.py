"""The reader alone, against Ray Data and a PyTorch DataLoader over PyArrow, on the same files.

    PYTHONPATH=tests python tests/benchmarks/bench_reader.py [--latent 4,32,32] [--samples 8192]
    PYTHONPATH=tests python tests/benchmarks/bench_reader.py --ranks 64 [--processes 8]

In one run and one after the other, on a local disk and from S3 (moto's server, a process of its
own), batches of the same size from the same Parquet files:
  stream   our reader: shuffled, posteriors drawn, captions drawn and their embeddings joined;
  mean     the same on a store whose posteriors have no spread, so that no noise is drawn;
  loader   a PyTorch DataLoader over PyArrow that does the same, but shuffles within a row group at
           most: torch.randn, a dictionary of all embeddings in memory, pad_sequence; with two
           worker processes and with none;
  hub      a PyTorch DataLoader over Hugging Face's `datasets`, which does all of this and shuffles
           over the epoch as we do; on a local disk, as it copies the rows there first;
  bare     the DataLoader over PyArrow, of the means alone: no noise, no captions, no order;
  ray      ray.data.read_parquet of the posteriors, decoded in map_batches, iter_torch_batches: no
           noise, no captions, no order;
  ray-mix  the same with a local shuffle buffer as large as our windows.
Rates are samples a second by the clock, after a first batch, with the memory settings of training
workers and one thread for the operations of each thread or process that makes batches. CPU time and
memory are of this process alone: beside other work, the CPU time of `stream` and `loader-0` tells
more than rates.

With --ranks, so many of our readers on one machine instead, which begin together and share its
cores: seconds to the first batch of the first and of the last of them, by how much a process's
memory grew for each rank, and how often a file of the bucket was asked for.
"""

import argparse
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import torch
from many_ranks import read_in_processes, requests_counted
from reader_runs import MIB, as_a_worker, make_store, moto, rate, stream
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, RandomSampler

from ldm_core.files import filesystem, is_remote
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.index import index_store

LATENTS = ("latent_mean", "latent_logvar")


def decode(data: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(b"".join(data), np.float16).reshape(-1, *shape).astype(np.float32)


def ray_data(
    version: StoreVersion, batch: int, shape: tuple[int, ...], buffer: int | None
) -> Iterator[int]:
    import ray

    def decoded(table: pa.Table) -> dict[str, np.ndarray]:
        return {name: decode(table[name].to_pylist(), shape) for name in LATENTS}

    files, fs = arrow_files(version)
    while True:
        rows = ray.data.read_parquet(files, columns=list(LATENTS), filesystem=fs)
        rows = rows.map_batches(decoded, batch_format="pyarrow", batch_size=1024)
        for found in rows.iter_torch_batches(
            batch_size=batch, prefetch_batches=4, local_shuffle_buffer_size=buffer
        ):
            yield len(found["latent_mean"])


class ArrowRows(torch.utils.data.IterableDataset):
    """Batches as a script of a page would make them, of the means alone or of everything."""

    def __init__(
        self, version: StoreVersion, batch: int, shape: tuple[int, ...], everything: bool
    ) -> None:
        self.files, self.fs = arrow_files(version)
        self.batch, self.shape, self.everything = batch, shape, everything
        self.embeddings = embeddings(version) if everything else {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        files = self.files[info.id :: info.num_workers] if info else self.files
        columns = [*LATENTS, "id", "captions"] if self.everything else ["latent_mean"]
        while True:
            dataset = pyarrow.dataset.dataset(files, filesystem=self.fs)
            for rows in dataset.to_batches(columns=columns, batch_size=self.batch):
                mean = torch.from_numpy(decode(rows["latent_mean"].to_pylist(), self.shape))
                yield self.whole(rows, mean) if self.everything else mean

    def whole(self, rows: pa.RecordBatch | pa.Table, mean: torch.Tensor) -> torch.Tensor:
        logvar = torch.from_numpy(decode(rows["latent_logvar"].to_pylist(), self.shape))
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        digests = [random.choice(told)["digest"] for told in rows["captions"].to_pylist()]
        chosen = [self.embeddings[digest] for digest in digests]
        tokens = pad_sequence([tokens for tokens, _ in chosen], batch_first=True).float()
        pooled = torch.stack([pooled for _, pooled in chosen]).float()
        assert len(tokens) == len(pooled) == len(rows["id"].to_pylist())
        return latents


class HubRows(torch.utils.data.Dataset):
    """The same of `datasets`' rows, whichever are asked for at once."""

    def __init__(self, plain: ArrowRows, cache: str) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.plain = plain
        self.rows = datasets.Dataset.from_parquet(
            plain.files, cache_dir=cache, columns=[*LATENTS, "id", "captions"]
        ).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: list[int]) -> torch.Tensor:
        rows = self.rows[indices]
        mean = torch.from_numpy(decode(rows["latent_mean"].to_pylist(), self.plain.shape))
        return self.plain.whole(rows, mean)


def hub(rows: HubRows, workers: int) -> Iterator[int]:
    """Epoch after epoch."""
    order = BatchSampler(RandomSampler(rows), rows.plain.batch, drop_last=False)
    context = "fork" if workers else None
    batches = torch.utils.data.DataLoader(
        rows, batch_size=None, sampler=order, num_workers=workers,
        multiprocessing_context=context, persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for found in batches:
            yield len(found)


def embeddings(version: StoreVersion) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and pooled vector of every caption."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for row in version.table("texts").to_pylist():
        name, width = ("tokens", 64) if row["tokens"] else ("pooled", 64)
        values = torch.from_numpy(np.frombuffer(row[name], np.float16).reshape(-1, width).copy())
        found.setdefault(row["caption_digest"], {})[name] = values
    return {digest: (each["tokens"], each["pooled"][0]) for digest, each in found.items()}


def loader(rows: ArrowRows, workers: int) -> Iterator[int]:
    context = "fork" if workers else None
    for found in torch.utils.data.DataLoader(
        rows, batch_size=None, num_workers=workers, multiprocessing_context=context
    ):
        yield len(found)


def arrow_files(version: StoreVersion) -> tuple[list[str], pa.fs.FileSystem | None]:
    """The files of `samples`, as Arrow's own S3 client and Ray Data want them."""
    groups = index_store(version).samples.groups
    _, root = filesystem(groups.uri)
    files = [f"{root}/{path.decode()}" for path in groups.paths]
    if not is_remote(groups.uri):
        return files, None
    return files, pa.fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"],
        access_key=os.environ["AWS_ACCESS_KEY_ID"],
        secret_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_REGION"],
        scheme="http",
    )


def measure(
    name: str, make: Callable[[], Iterator[int]], seconds: float, rates: dict[str, float]
) -> None:
    batches = make()
    try:
        rates[name], cpu = rate(batches, seconds)
    finally:
        batches.close()
    used = psutil.Process().memory_info().rss / MIB
    print(
        f"  {name:9} {rates[name]:9.0f} samples/s {1e6 * cpu:7.0f} us of CPU each in this process, "
        f"{used:6.0f} MiB",
        flush=True,
    )


def compare(root: str, args: argparse.Namespace, shape: tuple[int, ...]) -> None:
    drawn, fixed = (
        make_store(f"{root}/{name}", shape, args.samples, logvar)
        for name, logvar in (("drawn", -6.0), ("fixed", -60.0))
    )
    size = args.batch
    window = max(1, args.window * MIB // (4 * int(np.prod(shape)) + 3300))
    rows = {all: ArrowRows(drawn, size, shape, all) for all in (True, False)}
    peers: dict[str, Callable[[], Iterator[int]]] = {
        "stream": lambda: stream(drawn, size, args.threads, args.window * MIB),
        "mean": lambda: stream(fixed, size, args.threads, args.window * MIB),
        "ray": lambda: ray_data(drawn, size, shape, None),
        "ray-mix": lambda: ray_data(drawn, size, shape, max(window, 2 * size)),
        "loader-0": lambda: loader(rows[True], 0),
        "loader-2": lambda: loader(rows[True], 2),
        "bare-0": lambda: loader(rows[False], 0),
        "bare-2": lambda: loader(rows[False], 2),
    }
    if not is_remote(root):
        mapped = HubRows(rows[True], f"{root}/hub")
        peers |= {f"hub-{count}": partial(hub, mapped, count) for count in (0, 2)}
    rates: dict[str, float] = {}
    for name, make in peers.items():
        measure(name, make, args.seconds, rates)
    for name in ("stream", "mean"):
        told = ", ".join(
            f"{rates[name] / max(rates[each] for each in rates if each.startswith(peer)):.2f} "
            f"x {peer}"
            for peer in ("ray", "ray-mix", "loader", "hub", "bare")
            if any(each.startswith(peer) for each in rates)
        )
        print(f"  {name}: {told}", flush=True)


def many_ranks(root: str, args: argparse.Namespace, shape: tuple[int, ...]) -> None:
    """Every rank reads the first steps of an epoch from a store; prints what it took."""
    version = make_store(f"{root}/ranks", shape, args.samples, logvar=-6.0)
    options = {"budget": args.batch, "window_bytes": args.window * MIB, "text_bytes": 64 * MIB}
    begin = time.perf_counter()
    index = index_store(version)
    looked = time.perf_counter() - begin
    with requests_counted() if is_remote(root) else nullcontext(Counter()) as asked:
        found = read_in_processes(index, args.ranks, args.processes, args.steps, options)
    first = sorted(rank.first_s for process in found for rank in process.ranks)
    grown = [process.grown / len(process.ranks) / MIB for process in found]
    print(
        f"  index {looked:.2f} s; first batch {first[0]:.2f} s, median {first[len(first) // 2]:.2f}"
        f" s, last rank's {first[-1]:.2f} s; {max(grown):.1f} MiB a rank at most",
        flush=True,
    )
    if asked:
        print(f"  {asked.total()} requests, at most {max(asked.values())} of an object", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent", default="4,32,32", help="C,h,w of a latent")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--window", type=int, default=64, help="MiB of a lane's windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("local", "s3"), help="one of the two")
    parser.add_argument("--ranks", type=int, help="so many of ours, and nothing of others")
    parser.add_argument("--processes", type=int, default=8, help="that share the ranks")
    parser.add_argument("--steps", type=int, default=4, help="that each rank reads")
    args = parser.parse_args()
    as_a_worker()
    torch.set_num_threads(1)  # of each thread or process that makes batches, as DataLoader has it
    shape = tuple(map(int, args.latent.split(",")))
    run = many_ranks if args.ranks else compare
    if not args.ranks:
        import ray

        ray.init("local", num_cpus=os.cpu_count(), log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
    if args.only != "s3":
        print(f"local, latents of {shape}, batches of {args.batch}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run(str(Path(folder)), args, shape)
    if args.only != "local":
        with moto() as bucket:
            print(f"S3, latents of {shape}, batches of {args.batch}", flush=True)
            run(bucket, args, shape)


if __name__ == "__main__":
    main()
