"""What the training loop costs beside its network's own work, and against a plain loop.

    make bench-train [ARGS="--seconds 300 --compile"]

On one store of latents 3 x 16 x 16 and captions of 8 to 40 tokens, in one process, on all cores and
in one dtype. The three take turns of ten steps, so that a noisy machine is noisy for all of them,
and a ratio is told for each round of fifty:
  ours    the worker of `ldm train`: reader, prefetch, draws, Muon, averages, figures, and
          checkpoints, one a round, which is ten times as often as the demo's; they are copied in a
          step, and written while the next ones are computed. Windows are of one row group, so that
          a store as small as this one is read all the time: a row group every 32 steps;
  bare    the same network, loss and optimisers on one batch that is already there;
  plain   a training script as many are: torch.save'd latents and embeddings padded to 128 tokens, a
          DataLoader, AdamW, and diffusers' PixArt transformer of about as many parameters.
Rates are samples a second by the clock. What waiting for data takes is measured afterwards, in
steps of ours alone: in turns, its data would be read while the others compute. Of the demo's
network the reader's own rate is told, too.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from reader_runs import MIB, as_a_worker, make_store, rate, stream
from torch.utils.data import DataLoader, Dataset

from ldm_core.latents.store import StoreVersion
from ldm_core.training.layout import Layout
from ldm_core.training.step import autocast, compute_dtype
from pipelines import denoiser_worker, training_data, training_state
from pipelines.denoiser_network import new_update, rate_at
from pipelines.denoiser_worker import DenoiserTraining
from pipelines.recipes import RECIPES
from pipelines.recipes.base import Workers
from pipelines.training_data import find_data

CPU = torch.device("cpu")
SHAPE, TOKENS = (3, 16, 16), 128
SIZES = ((96, 4, 32), (384, 6, 32))  # width, depth, batch; the wide one takes ten minutes
SMALLEST = (96, 4)  # width and depth of image-s
TURN, ROUND = 10, 50  # steps; a round has one checkpoint
LOG, ALONE = 20, 5  # steps between figures, of which so many are of ours alone
WINDOW = 4 * MIB
READER_S = 10.0  # that the reader alone is measured


def our_training(
    version: StoreVersion,
    folder: str,
    size: tuple[int, int, int],
    precision: str,
    compile: bool,
    waits: list[float],
) -> DenoiserTraining:
    """The demo's recipe, of one worker; its figures are told to `waits` alone."""
    width, depth, batch = size
    recipe = RECIPES["image-s"]()
    section = recipe.train.model_copy(
        update={
            "width": width, "depth": depth, "heads": width // 24, "batch_size": batch,
            "micro_batches": 1, "workers": Workers(count=1), "steps": 10**6,
            "checkpoint_every": ROUND, "sample_every": 10**6,
            "log_every": LOG, "compile": compile,
        }
    )  # fmt: skip
    recipe = recipe.model_copy(update={"train": section, "root": folder, "precision": precision})
    data = find_data(recipe, version)
    silent = SimpleNamespace(metrics=lambda *_: None, document=lambda *_: None, untold=lambda: [])
    board = SimpleNamespace(seconds=SimpleNamespace(remote=lambda: 0.0))
    job: Any = SimpleNamespace(
        recipe=recipe, run=silent, product=folder, inputs={}, checkpoints=f"{folder}/checkpoints",
        begin=lambda first, seconds: first, board=board,
        log=lambda _, told, __: waits.append(told["data_wait_share"]),
    )  # fmt: skip
    training_data.WINDOW_BYTES = WINDOW
    training_state.ray = SimpleNamespace(get=lambda value: value)  # type: ignore[assignment]
    denoiser_worker.Judged = lambda job, scene: None  # type: ignore[assignment,misc]
    denoiser_worker.being_preempted = lambda: False
    reader = data.reader(section, recipe.seed)
    return DenoiserTraining(job, data, reader, Layout(), CPU)


def ours(training: DenoiserTraining) -> Iterator[None]:
    """Steps of the worker's own loop, with all that comes after each."""
    for done in training.steps(0):
        training.look(done)
        training.keep(done)
        yield


def bare(training: DenoiserTraining) -> Iterator[None]:
    """Another network of the same kind, on a batch that is there, its noise too."""
    recipe, section = training.recipe, training.section
    torch.manual_seed(0)
    parallel = denoiser_worker.arranged(recipe, training.config, Layout(), CPU)
    update = new_update(recipe, parallel)
    [batch] = training.reader.batches(0)
    t = torch.rand(len(batch))
    eps = torch.randn_like(batch.latents)
    x_t = (1 - t[:, None, None, None]) * batch.latents + t[:, None, None, None] * eps
    target = eps - batch.latents

    def losses() -> torch.Tensor:
        v = parallel.model(x_t, t, batch.condition)
        return (v.float() - target).square().flatten(1).mean(1)

    for step in range(10**9):
        with_rate = rate_at(section, min(step, section.steps - 1))
        update([losses], with_rate, len(batch), 1)
        yield


class Saved(Dataset):
    """Files of one sample each, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.pt"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return torch.load(self.files[index])


def save_padded(training: DenoiserTraining, folder: Path, count: int) -> Path:
    """What a script's own cache holds: a posterior's mean and tokens padded to 128, a file each."""
    folder.mkdir()
    reader, saved = training.reader, 0
    for step in reader.order.steps(0):
        for batch in reader.batches(step, epoch=0):
            cond = batch.condition.pad_to(TOKENS)
            for row in range(len(batch)):
                item = {"latent": batch.latents[row].half().clone()}
                item["tokens"] = cond.tokens[row].half().clone()
                item["mask"] = cond.mask[row].clone()
                torch.save(item, folder / f"{saved:06d}.pt")
                saved += 1
                if saved == count:
                    return folder
    return folder


def pixart(parameters: int, text_width: int) -> PixArtTransformer2DModel:
    """Of about as many parameters: the widest of four layers that has no more by much."""

    def made(head: int) -> PixArtTransformer2DModel:
        return PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=head, in_channels=3, out_channels=3,
            num_layers=4, cross_attention_dim=4 * head, sample_size=16, patch_size=2,
            caption_channels=text_width, use_additional_conditions=False,
        )  # fmt: skip

    def size(head: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in made(head).parameters())

    return made(min(range(8, 129, 4), key=lambda head: abs(size(head) - parameters)))


def plain(folder: Path, batch: int, parameters: int, text_width: int, dtype: torch.dtype) -> tuple:
    """A generator of steps, and the model's parameters."""
    model = pixart(parameters, text_width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = DataLoader(Saved(folder), batch, shuffle=True, drop_last=True)

    def steps() -> Iterator[None]:
        while True:
            for item in loader:
                x0, noise = item["latent"].float(), torch.randn(len(item["latent"]), *SHAPE)
                t = torch.sigmoid(torch.randn(len(x0)))
                x_t = (1 - t[:, None, None, None]) * x0 + t[:, None, None, None] * noise
                with autocast(CPU, dtype):
                    v = model(
                        x_t, item["tokens"].float(), timestep=1000 * t,
                        encoder_attention_mask=item["mask"].long(), return_dict=False,
                    )[0]  # fmt: skip
                loss = (v.float() - (noise - x0)).square().mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                yield

    return steps(), sum(p.numel() for p in model.parameters())


def in_turns(runs: dict[str, Iterator[None]], seconds: float) -> dict[str, np.ndarray]:
    """Seconds a step of each, (rounds,); the first steps of each warm up.

    A checkpoint comes in the middle of a turn, as it is still written during the steps after it.
    """
    for steps in runs.values():
        _take(steps, ROUND + TURN // 2)
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        used = dict.fromkeys(runs, 0.0)
        for _ in range(ROUND // TURN):
            for name, steps in runs.items():
                used[name] += _take(steps, TURN)
        for name, each in used.items():
            rounds[name].append(each / ROUND)
    return {name: np.array(each) for name, each in rounds.items()}


def told(ratios: np.ndarray) -> str:
    """The median of all rounds, the least and the most."""
    low, middle, high = ratios.min(), np.median(ratios), ratios.max()
    return f"{middle:.3f} ({low:.3f} to {high:.3f} in {len(ratios)} rounds)"


def waited(steps: Iterator[None], waits: list[float]) -> float:
    """The share of waiting for data in steps of ours alone."""
    waits.clear()
    while len(waits) <= ALONE:  # the first has begun while the others had their turns
        next(steps)
    return float(np.mean(waits[1:]))


def _take(steps: Iterator[None], count: int) -> float:
    begin = time.perf_counter()
    for _ in islice(steps, count):
        pass
    return time.perf_counter() - begin


def measure(args: argparse.Namespace, root: Path) -> None:
    """Print the ratios."""
    version = make_store(str(root / "latents"), SHAPE, args.samples, -1.0)
    for width, depth, batch in (size for size in SIZES if size[0] in args.widths):
        size, place = (width, depth, batch), str(root / f"run-{width}")
        waits: list[float] = []
        training = our_training(version, place, size, args.precision, args.compile, waits)
        parameters = sum(p.numel() for p in training.network.parameters())
        dtype = compute_dtype(CPU, args.precision)
        folder = save_padded(training, root / f"saved-{width}", min(args.samples, 2048))
        steps, theirs = plain(folder, batch, parameters, training.reader.token_width, dtype)
        print(
            f"\nwidth {width}, {parameters / 1e6:.2f}M parameters (PixArt {theirs / 1e6:.2f}M), "
            f"batches of {batch}, {dtype}{', compiled' * args.compile}, "
            f"{torch.get_num_threads()} threads",
            flush=True,
        )
        runs = {"ours": ours(training), "bare": bare(training), "plain": steps}
        seconds = in_turns(runs, args.seconds)
        each = ", ".join(f"{name} {1e3 * np.median(took):.1f}" for name, took in seconds.items())
        print(f"ms a step: {each}")
        print(f"step / bare, checkpoints included: {told(seconds['ours'] / seconds['bare'])}")
        print(f"samples a second, ours / plain: {told(seconds['plain'] / seconds['ours'])}")
        print(f"data wait: {100 * waited(runs['ours'], waits):.2f} % of the time", flush=True)
        if (width, depth) == SMALLEST:
            took = float(np.median(seconds["ours"]))
            tell_reader(version, batch, batch / took, READER_S)
        training.reader.close()


def tell_reader(version: StoreVersion, batch: int, consumed: float, seconds: float) -> None:
    """Print how many times faster the reader is than the fastest training that it feeds here."""
    batches = stream(version, batch, threads=2, window=64 * MIB)
    alone, _ = rate(batches, seconds)
    batches.close()
    print(
        f"the reader alone / what image-s, the fastest recipe here, consumes: {alone:.0f} / "
        f"{consumed:.0f} samples a second, {alone / consumed:.1f} times"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=180, help="of each size, or longer")
    parser.add_argument("--widths", nargs="+", type=int, default=[size[0] for size in SIZES])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="our blocks, of ours and bare")
    args = parser.parse_args()
    as_a_worker()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
