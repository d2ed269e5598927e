"""Which settings of the train section do not go together: a function refuses each such thing."""

import math
from typing import TYPE_CHECKING

from ldm_core.planning.accelerators import accelerator

if TYPE_CHECKING:
    from pipelines.recipes.train_section import TrainSection


def check_together(section: "TrainSection") -> None:
    """Refuse what cannot work, before anything is read or planned.

    Raises:
        ValueError: of the first such thing, with its values and a remedy.
    """
    for check in (
        _shares,
        _adapters,
        _eight_bits,
        _elastic,
        _network,
        _judged,
        _told_apart,
        _known,
    ):
        check(section)


def _shares(section: "TrainSection") -> None:
    """Every part of a batch has as many samples: their gradients are averaged as equals."""
    lanes = section.lanes
    if section.parts < lanes:
        raise ValueError(
            f"micro_batches {section.parts} are fewer than the {lanes} workers that are given "
            f"samples of their own: try micro_batches {lanes}, or more layout.context"
        )
    if section.tokens is None and section.batch_size % section.parts:
        counted = "workers.count" if section.parts == section.workers.count else "micro_batches"
        near = math.ceil(section.batch_size / section.parts) * section.parts
        raise ValueError(
            f"batch_size {section.batch_size} does not divide among {counted} {section.parts}: try "
            f"batch_size {near} or another {counted}"
        )


def _adapters(section: "TrainSection") -> None:
    """Refuse adapters on nothing, or in 8 bits."""
    if section.lora_rank is None:
        return
    if section.initial is None:
        raise ValueError(
            f"lora_rank {section.lora_rank} without initial: set initial to the model that the "
            "adapters are for, or leave lora_rank out to train all weights"
        )
    if section.float8:
        raise ValueError(
            f"float8 with lora_rank {section.lora_rank}: float8 is of plain linear layers, which "
            "adapted ones are not; leave one of them out"
        )


def _eight_bits(section: "TrainSection") -> None:
    """Refuse here what every worker would."""
    if section.float8 and not section.workers.gpus:
        raise ValueError(
            "float8 is for GPUs of compute capability 8.9 or more, but workers.gpus is 0: set "
            "workers.gpus=1, or leave float8 out"
        )


def _elastic(section: "TrainSection") -> None:
    """Refuse numbers of workers with which some would be given no samples."""
    least, count, context = section.least_workers, section.workers.count, section.layout.context
    if least is None:
        return
    if least > count or least % context:
        raise ValueError(
            f"least_workers {least} of workers.count {count} at layout.context {context}: "
            "choose a multiple of the context, at most the count"
        )
    most = max(n // section.layout.context_of(n) for n in range(least, count + 1))
    if most > section.parts:
        raise ValueError(
            f"least_workers {least} of workers.count {count} at layout.context {context}: up "
            f"to {most} workers, where the context does not divide their number, are given "
            f"samples of their own, but a step has {section.parts} micro_batches: set "
            f"micro_batches {most} or more, or least_workers {count}"
        )


def _network(section: "TrainSection") -> None:
    """Refuse what the backbone has no use for, rather than to leave it unheard: but the shape
    of a network that has its own, as every recipe has one.
    """
    if section.backbone == "diffusers":
        _given(section)
        return
    if section.heads % section.layout.context:
        raise ValueError(
            f"heads {section.heads} do not divide among layout.context {section.layout.context}: "
            f"choose a divisor of {section.heads}"
        )
    plain = type(section).model_fields
    others = {"dit": ("single_depth", "positions"), "mmdit": ("text_depth",)}
    for name in others[section.backbone]:
        if getattr(section, name) != plain[name].default:
            raise ValueError(
                f"{name} {getattr(section, name)} is of another backbone than "
                f"{section.backbone}: leave it at {plain[name].default}"
            )
    if section.positions == "fixed" and any(not name.endswith("x1") for name in section.buckets):
        raise ValueError(
            f"positions fixed are for pictures, but buckets are {', '.join(section.buckets)}: "
            "choose positions rotary"
        )


def _given(section: "TrainSection") -> None:
    """What a transformer of diffusers needs, and what it cannot."""
    if section.initial is None:
        raise ValueError(
            "backbone diffusers without initial: set initial to the folder of a diffusers "
            "transformer, or choose backbone dit or mmdit"
        )
    if section.layout.context > 1:
        raise ValueError(
            f"layout.context {section.layout.context} with backbone diffusers, whose tokens "
            "cannot be dealt out: set layout.context=1, and layout.shard for more room"
        )


def _judged(section: "TrainSection") -> None:
    for name, plain in (("patience", None), ("promote", "always")):
        value = getattr(section, name)
        if value != plain and not section.validation_samples:
            raise ValueError(
                f"{name} {value} goes by the loss on held-out rows, but validation_samples is "
                f"0: set validation_samples, or leave {name} out"
            )


def _told_apart(section: "TrainSection") -> None:
    """Averages go by their numbers in six digits."""
    for field in ("ema_decays", "ema_lengths"):
        named: dict[str, float] = {}
        for value in getattr(section, field):
            if (name := f"{value:g}") in named:
                raise ValueError(
                    f"{field} {named[name]} and {value} are both called {name}: let them "
                    "differ in their first six digits, or leave one out"
                )
            named[name] = value


def _known(section: "TrainSection") -> None:
    if section.accelerator is not None:
        accelerator(section.accelerator)
