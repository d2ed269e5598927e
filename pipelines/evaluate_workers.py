"""What the evaluation runs on Ray workers: one row names a batch of scenes, its verdicts return.

Scenes and seeds are functions of the row, so nothing but names travels out, and back come the
verdicts and, of the first scenes of each kind, the pictures.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch

from ldm_core.autoencoders.autoencoder import Autoencoder
from ldm_core.evaluation.prompts import evaluation_scenes
from ldm_core.evaluation.verifier import Verdict, verify
from ldm_core.generation import PictureGenerator, PictureRequest
from ldm_core.media.pixels import to_image, to_pixels
from ldm_core.media.shapes import Scene, render_scene
from pipelines import ray_runtime
from pipelines.recipes.sections import Workers
from pipelines.scores import KINDS, Entry, Kind

SHOWN = 16  # pictures kept of each kind
KIND_SEEDS = 1_000_000  # apart, so that no two scenes share their noise

Row = dict[str, Any]
Painter = Callable[[Sequence[Scene], Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
        entries: what is scored.
        teacher: URI of the model whose autoencoder makes the reconstructions.
        size: side of the pictures, pixels.
        counts: scenes of each kind.
        seed: of scenes and noise.
        batch_size: scenes per row.
    """

    entries: tuple[Entry, ...]
    teacher: str
    size: int
    counts: dict[Kind, int]
    seed: int
    batch_size: int

    def scenes(self) -> dict[Kind, list[Scene]]:
        """The fixed scenes of each kind."""
        return {
            kind: evaluation_scenes(kind, count, self.seed) for kind, count in self.counts.items()
        }

    def seeds(self, kind: Kind, start: int, stop: int) -> list[int]:
        """Seed of the noise of scenes start..stop, the same for every model and step count."""
        first = self.seed + KIND_SEEDS * KINDS.index(kind)
        return list(range(first + start, first + stop))

    def rows(self) -> list[Row]:
        """Every batch of every entry, the slowest first."""
        return [
            {
                "entry": entry.name,
                "kind": kind,
                "start": start,
                "stop": min(start + self.batch_size, count),
            }
            for entry in sorted(self.entries, key=lambda entry: -entry.steps)
            for kind, count in self.counts.items()
            for start in range(0, count, self.batch_size)
        ]


@dataclass(frozen=True)
class Result:
    """The verdicts on one row's pictures; `pictures` (n, H, W, 3) uint8 are the first ones."""

    entry: str
    kind: Kind
    start: int
    verdicts: list[Verdict]
    pictures: np.ndarray
    seconds: float


def score_on_ray(job: Job, workers: Workers, verbose: bool) -> Iterator[Result]:
    """Draw and judge all rows on a pool of workers; results come as they are finished."""
    ray_runtime.start(verbose)
    remedy = "lower evaluate.workers.cpus or .gpus"
    ray_runtime.check_room("evaluate", workers.cpus, workers.gpus, remedy)
    rows = job.rows()
    most = min(workers.count, len(rows))
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ScorePictures,  # type: ignore[arg-type]  # Ray makes it once in each worker
        fn_constructor_args=(job, workers.threads, workers.device),
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=most, max_size=most),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
    )
    for row in results.iter_rows():
        yield _result(row, job.size)


def _result(row: Row, size: int) -> Result:
    return Result(
        entry=row["entry"],
        kind=row["kind"],
        start=row["start"],
        verdicts=[Verdict(**verdict) for verdict in json.loads(row["verdicts"])],
        pictures=np.frombuffer(row["pictures"], np.uint8).reshape(-1, size, size, 3),
        seconds=row["seconds"],
    )


class ScorePictures:
    """Row -> the verdicts on an entry's pictures of its scenes.

    A worker loads a model when its first row comes, once.
    """

    def __init__(self, job: Job, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.job, self.device = job, device
        self.scenes = job.scenes()
        self._painters: dict[str, Painter] = {}
        self._loaded: dict[str, PictureGenerator] = {}

    def __call__(self, row: Row) -> Row:
        """Draw one batch of scenes and judge each picture."""
        paint = self._painter(row["entry"])
        kind, start, stop = row["kind"], row["start"], row["stop"]
        scenes = self.scenes[kind][start:stop]
        begin = time.monotonic()
        pictures = paint(scenes, self.job.seeds(kind, start, stop))
        seconds = time.monotonic() - begin
        pairs = zip(pictures, scenes, strict=True)
        return {
            **row,
            "verdicts": json.dumps([asdict(verify(picture, scene)) for picture, scene in pairs]),
            "pictures": pictures[: max(0, SHOWN - start)].tobytes(),
            "seconds": seconds,
        }

    def _painter(self, name: str) -> Painter:
        if name not in self._painters:
            entry = next(entry for entry in self.job.entries if entry.name == name)
            self._painters[name] = self._new_painter(entry)
        return self._painters[name]

    def _new_painter(self, entry: Entry) -> Painter:
        if entry.source == "real":
            return lambda scenes, _: render(scenes, self.job.size)
        if entry.source == "reconstructed":
            autoencoder = self._load(self.job.teacher).autoencoder
            return lambda scenes, _: reconstruct(render(scenes, self.job.size), autoencoder)
        generator = self._load(entry.model)
        return lambda scenes, seeds: generate(generator, scenes, seeds, entry.steps)

    def _load(self, uri: str) -> PictureGenerator:
        if uri not in self._loaded:
            self._loaded[uri] = PictureGenerator.load(uri, self.device)
        return self._loaded[uri]


def render(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """The true pictures of the scenes, (B, size, size, 3) uint8."""
    return np.stack([np.asarray(render_scene(scene, size)) for scene in scenes])


def reconstruct(pictures: np.ndarray, autoencoder: Autoencoder) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 through the latent space and back, at the posterior's mean."""
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    return to_image(autoencoder.decode(autoencoder.encode(pixels).mean).cpu())


def generate(
    generator: PictureGenerator, scenes: Sequence[Scene], seeds: Sequence[int], steps: int
) -> np.ndarray:
    """What a model draws for the scenes' captions."""
    pairs = zip(scenes, seeds, strict=True)
    return generator.generate([PictureRequest(scene.caption, seed, steps) for scene, seed in pairs])
