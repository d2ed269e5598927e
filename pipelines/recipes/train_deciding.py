"""Which of the train section's settings decide its model: a training's digest is over them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.recipes.train_section import TrainSection

# They change how fast the result comes and what is told on the way, not what it is.
_TELLING = {"log_every", "sample_every", "checkpoint_every", "validate_every"}
_HOW = {
    "workers",
    "least_workers",
    "layout",
    "micro_batches",
    "activation_checkpointing",
    "compile",
    "max_failures",
}
_KEPT = {
    "keep_checkpoints",
    "snapshot_every",
    "validation_gpus",
    "accelerator",
    "worker_hour_price",
    "promote",
    "system_metrics",
}
_SHAPE = {
    "patch_size", "width", "depth", "heads", "mlp_ratio", "text_depth", "single_depth", "qk_norm",
    "positions",
}  # fmt: skip
# Names of what is read: the digests of what they mean are the stage's inputs.
_NAMES = {"store_version", "mix", "initial"}
# What the first program had: it counts whatever it says.
_FORMER = {
    "steps", "batch_size", "learning_rate", "clip_norm", "patch_size", "width", "depth", "heads",
    "warmup_steps", "decay_fraction", "weight_decay", "caption_drop", "timestep_mean",
    "timestep_std", "timestep_shift", "ema_decay", "sample_steps", "guidance",
}  # fmt: skip


def deciding_values(section: "TrainSection") -> dict[str, Any]:
    """By name; a field that a former program did not have counts once it says something new."""
    left_out = _TELLING | _HOW | _KEPT | _NAMES
    if section.backbone == "diffusers":
        left_out |= _SHAPE  # which its folder says
    values = section.model_dump(mode="json", exclude=left_out)
    plain = type(section).model_construct().model_dump(mode="json")
    return {n: value for n, value in values.items() if n in _FORMER or value != plain[n]}
