"""The smallest recipe that exercises every stage, and stages without Ray's processes."""

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from ldm_core.files import join
from pipelines import denoiser_worker, encode_changes
from pipelines.encode_latents import encode
from pipelines.encode_media import Row, decode_shard, probe_entries
from pipelines.encode_plan import Item, Job
from pipelines.encode_workers import EncodeShard
from pipelines.ray_training import Job as TrainingJob
from pipelines.recipes import RECIPES
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, Workers
from pipelines.stage import Context, Options, Record, checkpoint_place
from pipelines.validation import Scene, Validator

SIZE = 16


def tiny_recipe(data: str, root: str, workers: int = 2, **sections: dict) -> Recipe:
    """`image-tiny` in pixel space at 16 pixels; `sections` overrides fields of its sections."""
    recipe = RECIPES["image-tiny"]()
    changes = {
        name: getattr(recipe, name).model_copy(
            update={"workers": Workers(count=workers), **sections.get(name, {})}
        )
        for name in ("autoencoder", "train", "distill")
    }
    changes["autoencoder"] = AutoencoderSection.model_validate(
        {**changes["autoencoder"].model_dump(), "source": "identity"}
        | sections.get("autoencoder", {})
    )
    places = {"data": data, "root": root, "size": SIZE, "precision": "fp32"}
    return recipe.model_copy(update={**places, **changes})


def encode_here(recipe: Recipe, options: Options | None = None) -> Record:
    """The encode stage with its workers in this process, which starts at once."""

    def parts(entries: list[Item], job: Job, *_: object) -> list[Item]:
        return json.loads(probe_entries({"items": json.dumps(entries)}, job)["items"])

    def shards(rows: list[Row], job: Job, *_: object) -> Iterator[Row]:
        encode = EncodeShard(job, threads=1, device="cpu")
        return (encode(decode_shard(row, job)) for row in rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_changes, "probe_files", parts)
        patch.setattr(encode_changes, "encode_shards", shards)
        return encode(recipe, options or Options())


class JudgedHere:
    """What hands weights to a validator, which judges them before training goes on."""

    def __init__(self, job: TrainingJob, scene: Scene) -> None:
        self.job, self.validator = job, Validator(job, scene, "cpu")
        self.losses: dict[int, float] = {}
        self.given_up: dict[int, str] = {}

    def takes(self, step: int) -> bool:
        """Nothing waits."""
        return True

    def hand_over(self, weights: Any, step: int, loss: bool, pictures: bool, needed: bool) -> None:
        if loss:
            figures = self.validator.loss(weights, step)
            self.losses[step] = figures["validation_loss"]
            self.job.run.metrics(figures, step)
        if pictures:
            self.validator.show(weights, step).tell(self.job.run, step)

    def wait(self) -> None:
        """Nothing is under way."""


def train_here(stage: Callable[..., Record], recipe: Recipe) -> Record:
    """A training stage with its worker in this process: Ray Train's local mode."""

    def fit(
        context: Context, worker: Callable[..., Any], workers: Workers, *_: object
    ) -> dict[str, Any]:
        silent = SimpleNamespace(remote=lambda *_: None)
        board = SimpleNamespace(begin=silent, post=silent, seconds=silent)
        checkpoints = join(*checkpoint_place(context.recipe, context.product, context.digest))
        inputs = dict(context.inputs)
        job = TrainingJob(
            context.recipe, context.run, context.product, inputs, checkpoints, board, workers
        )
        alone = ScalingConfig(num_workers=0)
        result = TorchTrainer(worker, train_loop_config={"job": job}, scaling_config=alone).fit()
        return dict(result.return_value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[stage.__module__], "fit", fit)
        patch.setattr("ray.get", lambda value: value)
        patch.setattr(denoiser_worker, "Judged", JudgedHere)
        return stage(recipe, Options())
