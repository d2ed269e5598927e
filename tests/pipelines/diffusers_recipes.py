"""Folders of tiny transformers of diffusers, and recipes that train them."""

import json
from pathlib import Path

import tiny_diffusers as tiny
from small_store import small_store
from typer.testing import Result

from pipelines.recipe_options import Arguments
from pipelines.recipes.schema import Recipe

ADAMW = "train.optimizer=adamw"
TEXT = 5  # of small_store's tokens
TABLE = {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03}


def wan(folder, **config) -> str:
    shape = {"text_dim": TEXT, "in_channels": 3, "out_channels": 3}
    tiny.wan(**{**shape, **config}).save_pretrained(folder)
    return str(folder)


def pixart(folder, **config) -> str:
    shape = {"caption_channels": TEXT, "in_channels": 3, "out_channels": 6}
    tiny.pixart(**{**shape, **config}).save_pretrained(folder)
    beside = Path(folder).parent / "scheduler"
    beside.mkdir(exist_ok=True)
    (beside / "scheduler_config.json").write_text(json.dumps(TABLE))
    return str(folder)


def words_for(root: Path, initial: str, *words: str) -> tuple[str, ...]:
    return (
        f"tracking_uri=sqlite:///{root.parent}/mlflow.db",
        "size=8", "precision=fp32", "autoencoder.source=identity",
        "train.workers.count=1", "train.steps=3", "train.batch_size=4", "train.checkpoint_every=2",
        "train.log_every=1", "train.sample_every=3", "train.sample_steps=2",
        "train.learning_rate=0.01", "train.warmup_steps=0", "train.micro_batches=2",
        "train.backbone=diffusers", f"train.initial={initial}", *words,
    )  # fmt: skip


def recipe_at(root: Path, initial: str, *words: str) -> Recipe:
    overrides = words_for(root, initial, *words)
    return Arguments("image-tiny", root=str(root), overrides=overrides).resolve()


def dry_run(ldm, root: Path, initial, *words, store=(3, 8, 8)) -> Result:
    """`ldm train --dry-run` of a store of pictures, or without one."""
    if store and not root.exists():
        small_store(root / "latents", shape=store)
    words = words_for(root, initial, *words)
    sets = [part for word in words for part in ("--set", word)]
    return ldm("train", "image-tiny", "--root", root, "--dry-run", *sets)
