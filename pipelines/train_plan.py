"""What a training would take: `ldm train RECIPE --dry-run`, with a store or before there is one.

    recipe and store -> transformer on the meta device -> parameters, FLOPs, memory, time, cost

Nothing is computed. What cannot work is refused here, before any worker starts.
"""

from dataclasses import dataclass

import torch
from pydantic import ValidationError

from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.backbones.dit import DiTConfig
from ldm_core.backbones.embeddings import patch_grid
from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError
from ldm_core.planning.accelerators import Accelerator, accelerator
from ldm_core.planning.forward_pass import ForwardPass, measure_forward
from ldm_core.planning.memory import GIB, memory_of
from ldm_core.planning.search import fits, fitting
from ldm_core.planning.step import Sample, Step
from ldm_core.planning.weights import weights_of
from ldm_core.training.layout import Layout
from ldm_core.training.lora import attention_layers
from pipelines.backbones import (
    BackboneConfig,
    LatentShape,
    LatentSpace,
    backbone_config,
    new_backbone,
)
from pipelines.diffusers_backbone import check_captions, checked, with_initial_sizes
from pipelines.recipe_options import describe_errors
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection


@dataclass(frozen=True)
class TrainingPlan:
    """A recipe's training step.

    Attributes:
        backbone: the transformer.
        step: the main bucket is its first sample.
        on: what the recipe says that its workers have; None is not said.
    """

    backbone: BackboneConfig
    step: Step
    on: Accelerator | None


def plan_training(recipe: Recipe, space: LatentSpace) -> TrainingPlan:
    """Plan training on latents of this kind.

    Raises:
        UserError: the transformer does not fit the latents, or the layout not the transformer or
            the tokens of some bucket.
    """
    section = with_initial_sizes(recipe).train
    config = fitting_backbone(section, space)
    with torch.device("meta"):
        network = new_backbone(config)
    weights = weights_of(network)
    layout = layout_of(section)
    layout.check(section.workers.count, section.heads, weights.fewest_rows)
    dtype = compute_dtype(recipe)
    autocast = dtype if dtype != torch.float32 else None
    tokens = {name: _tokens(latent, section.patch_size) for name, latent in space.latents.items()}
    check_tokens(tokens, layout)
    counts = micro_samples(section, tokens)
    samples = tuple(
        Sample(
            name,
            tokens[name],
            space.max_tokens,
            _forward(network, latent, space, min(2, counts[name]), autocast),
        )
        for name, latent in space.latents.items()
    )
    step = Step(
        weights=weights,
        samples=samples,
        layout=layout,
        micro_batches=section.parts,
        micro_samples=counts,
        optimizer=section.optimizer if section.lora_rank is None else "adamw",
        averages=1 + len(section.ema_decays) + len(section.ema_lengths),
        compute_bytes=dtype.itemsize,
        checkpointing=section.activation_checkpointing,
        adapters=adapter_weights(network, section.lora_rank),
    )
    on = accelerator(section.accelerator) if section.accelerator else None
    return TrainingPlan(config, step, on)


def adapter_weights(network: torch.nn.Module, rank: int | None) -> int | None:
    """How many weights the adapters of a network have: r (in + out) for each layer with one."""
    if rank is None:
        return None
    layers = dict(network.named_modules())
    sides = (layers[name].get_parameter("weight").shape for name in attention_layers(network))
    return sum(rank * (rows + columns) for rows, columns in sides)


def fitting_backbone(section: TrainSection, space: LatentSpace) -> BackboneConfig:
    """The transformer for all of these latents.

    Raises:
        UserError: a width, number of heads or patch size that does not divide, videos for a
            network of pictures, or a diffusers transformer that reads something else.
    """
    try:
        widths = space.text_width, space.pooled_width
        config = backbone_config(section, space.main, *widths)
        if isinstance(config, DiffusersConfig):
            for latent in space.latents.values():
                checked(section, config, latent, *widths)
            check_captions(section, config, space.max_tokens)
            return config
        for latent in space.latents.values():
            backbone_config(section, latent, *widths)
            patch_grid(latent[-2:], section.patch_size)
        _check_frames(config, space)
    except ValidationError as error:
        raise UserError(f"train: {describe_errors(error)}") from error
    except UserError as error:
        raise UserError(f"train: {error}") from error
    return config


def _check_frames(config: DiTConfig | MMDiTConfig, space: LatentSpace) -> None:
    """Refuse videos where the network has no place for frames."""
    videos = [n for n, latent in space.latents.items() if len(latent) == 4 and latent[1] > 1]
    takes_them = config.frame_pairs if isinstance(config, DiTConfig) else config.rotary
    if videos and not takes_them:
        remedy = "name them in train.buckets, too"
        if isinstance(config, MMDiTConfig):
            remedy = "set train.positions=rotary"
        raise UserError(
            f"the store or train.mix holds videos of {', '.join(videos)}, but the transformer is "
            f"one of pictures: {remedy}, or leave them out"
        )


def check_tokens(tokens: dict[str, int], layout: Layout) -> None:
    """Refuse buckets whose tokens cannot be dealt out.

    Raises:
        UserError: `layout.context` does not divide one.
    """
    odd = [f"{count} of {name}" for name, count in tokens.items() if count % layout.context]
    if odd:
        raise UserError(
            f"the tokens of a sample do not divide among layout.context {layout.context}: "
            f"{', '.join(odd[:4])}; set train.layout.context to a divisor of them all, or encode "
            "other buckets"
        )


def layout_of(section: TrainSection) -> Layout:
    """How the workers are arranged."""
    layout = section.layout
    return Layout(layout.replicas(section.workers.count), layout.shard, layout.context)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """Of the plan: "auto" is bfloat16 on GPUs; which CPUs have it, only they know."""
    section = recipe.train
    on_gpus = bool(section.workers.gpus or section.accelerator)
    low = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpus)
    return torch.bfloat16 if low else torch.float32


def micro_samples(section: TrainSection, tokens: dict[str, int]) -> dict[str, int]:
    """Samples of each bucket in a micro-batch: as many as its tokens allow, at least one.

    Args:
        section: its `tokens`, or else its batch size in samples of the main bucket, is the budget.
        tokens: of a sample of each bucket, the main one first.
    """
    main = next(iter(tokens.values()))
    budget = section.tokens or section.batch_size // section.parts * main
    return {name: max(1, budget // count) for name, count in tokens.items()}


def check_memory(plan: TrainingPlan, heads: int) -> None:
    """Refuse a step that has no room on the recipe's accelerator, and name one that has.

    Raises:
        UserError: it needs more memory than there is.
    """
    if plan.on is None or fits(plan.step, plan.on):
        return
    memory, room = memory_of(plan.step), plan.on.usable_bytes
    largest = sorted(memory.parts().items(), key=lambda part: -part[1])[:3]
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    better = fitting(plan.step, plan.on, heads)
    remedy = "choose a smaller network or accelerators with more memory"
    if better is not None:
        remedy = f"{memory_of(better).total / GIB:.1f} GiB with {changes(plan.step, better)}"
    raise UserError(
        f"{plan.step.layout} of {plan.on.name} needs {memory.total / GIB:.1f} GiB a device "
        f"({told}), and {room / GIB:.1f} of its {plan.on.gib:g} GiB are usable: {remedy}"
    )


def changes(step: Step, other: Step) -> str:
    """The `--set` words that make the one the other."""
    words = {
        "workers.count": other.layout.world != step.layout.world and other.layout.world,
        "layout": other.layout != step.layout
        and f"'{{shard: {other.layout.shard}, context: {other.layout.context}}}'",
        "activation_checkpointing": other.checkpointing != step.checkpointing
        and other.checkpointing,
        "micro_batches": other.micro_batches != step.micro_batches and other.micro_batches,
    }
    return " ".join(f"--set train.{name}={value}" for name, value in words.items() if value)


def _tokens(latent: LatentShape, patch_size: int) -> int:
    h, w = patch_grid(latent[-2:], patch_size)
    return h * w * (latent[1] if len(latent) == 4 else 1)


def _forward(
    network: torch.nn.Module,
    latent: LatentShape,
    space: LatentSpace,
    batch: int,
    autocast: torch.dtype | None,
) -> ForwardPass:
    """Of one sample with the longest caption; beside another, where it is not alone in its batch,
    for which some tensors are copied that would not be.
    """
    with torch.device("meta"):
        caption = TextCondition(
            torch.empty(batch, space.max_tokens, space.text_width),
            torch.ones(batch, space.max_tokens, dtype=torch.bool),
            torch.empty(batch, space.pooled_width),
        )
        x_t, t = torch.empty(batch, *latent), torch.empty(batch)
    return measure_forward(network, x_t, t, caption, autocast=autocast).of_one(batch)
