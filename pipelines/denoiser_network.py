"""The teacher's network in its layout, and what moves its weights, as the recipe says."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm_core.backbones.build import Backbone, without_weights
from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.reading.stream import StreamReader
from ldm_core.training.adapter_weights import AdaptersOf, apart, with_added
from ldm_core.training.averages import Averages
from ldm_core.training.ema import Ema
from ldm_core.training.guard import SpikeGuard
from ldm_core.training.layout import Layout
from ldm_core.training.lora import add_lora
from ldm_core.training.optimizers import Optimizers, adamw, hidden_matrices, muon_and_adamw
from ldm_core.training.parallel import Parallel, parallelise
from ldm_core.training.power_ema import PowerEma
from ldm_core.training.recomputation import Recompute, recompute_all, recompute_cheap
from ldm_core.training.schedules import (
    warmup_then_constant,
    warmup_then_cosine,
    warmup_then_decay,
)
from ldm_core.training.shards import deal_out, give_memory, whole_weights
from ldm_core.training.step import TrainingStep, compute_dtype
from pipelines.backbones import BackboneConfig, backbone_config, lists_of_blocks, new_backbone
from pipelines.model_uri import model_uri
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection
from pipelines.train_initial import check_unchanged

MODEL = "model"  # the average that is the model
_RECOMPUTE: dict[str, Recompute | None] = {
    "none": None,
    "selective": recompute_cheap,
    "full": recompute_all,
}


def fitting(section: TrainSection, reader: StreamReader, bucket: str) -> BackboneConfig:
    """The transformer that fits what the reader reads."""
    return backbone_config(section, reader.shapes[bucket], reader.token_width, reader.pooled_width)


def arranged(
    recipe: Recipe,
    config: BackboneConfig,
    layout: Layout,
    device: torch.device,
    initial: str | None = None,
) -> Parallel:
    """The network over all workers, with the same weights to begin with on each.

    Args:
        recipe, config: what it is.
        layout: of the workers.
        device: of this one.
        initial: digest that the initial model is to have; None takes any.

    Raises:
        UserError: the layout does not fit, or the initial model.
    """
    section, sharded = recipe.train, layout.holders > 1
    if sharded:
        with without_weights():
            network = with_adapters(section, new_backbone(config))
    else:
        network = new_weights(recipe, config, initial).to(device)
    parallel = parallelise(
        network,
        [block for blocks in lists_of_blocks(network) for block in blocks],
        layout,
        device,
        compute_dtype(device, recipe.precision),
        _RECOMPUTE[section.activation_checkpointing],
        section.compile,
        section.float8,
    )
    if sharded:  # no worker but the first ever holds the whole
        give_memory(network, device)
        whole = None if parallel.rank else new_weights(recipe, config, initial).state_dict()
        deal_out(network, whole)
    return parallel


def new_weights(recipe: Recipe, config: BackboneConfig, initial: str | None = None) -> Backbone:
    """The network as training begins, in main memory: the same on every worker.

    Raises:
        UserError: the initial model does not fit, or has another digest than `initial`.
    """
    torch.manual_seed(recipe.seed)
    as_it_is = isinstance(config, DiffusersConfig)
    with without_weights() if as_it_is else nullcontext():  # it may be large, and all are loaded
        network = new_backbone(config)
    if recipe.train.initial:
        from ldm_core.model_export import initial_weights  # here: diffusers takes seconds

        uri = model_uri(recipe.train.initial)
        initial_weights(uri, as_it_is).load_into(network)
        if initial is not None:
            check_unchanged(uri, initial)  # now: what was put there meanwhile is noticed too
    return with_adapters(recipe.train, network)


def with_adapters(section: TrainSection, network: Backbone) -> Backbone:
    """The network, with the adapters that alone are trained if the recipe wants some.

    Their alpha is their rank, so what is added is B A itself.
    """
    if section.lora_rank is not None:
        add_lora(network, section.lora_rank, alpha=section.lora_rank)
    return network


def new_update(recipe: Recipe, parallel: Parallel) -> TrainingStep:
    """What updates the network on this worker."""
    section, device = recipe.train, parallel.device
    return TrainingStep(
        parallel.network,
        _optimizers(recipe, parallel),
        device,
        compute_dtype(device, recipe.precision),
        section.clip_norm,
        parallel=parallel,
        guard=SpikeGuard(section.spike_factor) if section.spike_factor else None,
    )


def _optimizers(recipe: Recipe, parallel: Parallel) -> Optimizers:
    """AdamW, and in its place Muon for the matrices of attention and MLP.

    Adapters have AdamW: Muon makes an update's singular values alike, and of a factor of a matrix
    of low rank that says nothing about the matrix.
    """
    section, network = recipe.train, parallel.network
    if section.optimizer == "adamw" or section.lora_rank is not None:
        return adamw(network, section.learning_rate, section.weight_decay)
    return muon_and_adamw(
        network,
        hidden_matrices(*lists_of_blocks(network)),
        section.learning_rate,
        section.weight_decay,
        compute_dtype(parallel.device, recipe.precision),
        parallel.rank,
        parallel.layout.world,
    )


def new_averages(section: TrainSection, network: torch.nn.Module) -> Averages:
    """The model, and whatever other averages the recipe wants; of adapters if there are some."""
    seen = network if section.lora_rank is None else AdaptersOf(network)
    others: dict[str, Any] = {f"{decay:g}": Ema(seen, decay) for decay in section.ema_decays}
    powers = {power_name(std): PowerEma(seen, std) for std in section.ema_lengths}
    return Averages({MODEL: Ema(seen, section.ema_decay), **others, **powers})


def model_weights(
    section: TrainSection, network: torch.nn.Module, averages: Averages, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model as it is now, whole, in main memory, on the workers that `keep` it; all call this.

    Returns:
        Averaged weights by the names of a network without adapters; and the averaged adapters that
        are merged into them, if there are some.
    """
    averaged = averages[MODEL].state_dict()
    if section.lora_rank is None:
        return whole_weights(averaged, keep), {}
    base, adapters = apart(whole_weights({**network.state_dict(), **averaged}, keep))
    return with_added(base, adapters, scale=1.0), adapters


def power_name(std: float) -> str:
    """Of a power-function average."""
    return f"power-{std:g}"


def rate_at(section: TrainSection, step: int) -> float:
    """The multiplier of the learning rate."""
    steps, warmup = section.steps, section.warmup_steps
    schedules = {
        "constant": partial(warmup_then_constant, step, warmup),
        "cosine": partial(warmup_then_cosine, step, steps, warmup),
        "wsd": partial(warmup_then_decay, step, steps, warmup, section.decay_fraction),
    }
    return schedules[section.schedule]()
