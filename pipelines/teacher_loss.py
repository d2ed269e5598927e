"""What the teacher's training learns from: micro-batches, what is drawn for them, and the loss.

Draws are functions of (seed, step, sample) alone.
"""

from dataclasses import dataclass

from torch import Tensor

from ldm_core.conditioning.text import TextCondition, drop_captions
from ldm_core.diffusion.denoiser import Network
from ldm_core.diffusion.timesteps import logit_normal
from ldm_core.latents.reader import LatentBatch
from ldm_core.objectives.flow_matching import flow_matching_loss
from ldm_core.training.draws import Draws, draw
from ldm_core.training.loss_by_time import LossByTime
from pipelines.recipes.schema import Recipe


@dataclass(frozen=True)
class Sample:
    """A micro-batch and what is drawn for it at its step."""

    batch: LatentBatch
    draws: Draws


def drawn(recipe: Recipe, batch: LatentBatch, step: int) -> Sample:
    """The draws are functions of seed, step and sample."""
    shape, drop = tuple(batch.latents.shape[1:]), recipe.train.caption_drop
    return Sample(batch, draw(recipe.seed, step, batch.ids, shape, drop))


def teacher_loss(
    recipe: Recipe,
    model: Network,
    null: TextCondition,
    by_time: LossByTime | None,
    sample: Sample,
) -> Tensor:
    """Flow matching of a micro-batch, (B,), with some of its captions dropped.

    `by_time` is told, unless the losses count nothing.
    """
    section, device = recipe.train, null.tokens.device
    batch, draws = sample.batch, sample.draws
    t = logit_normal(
        draws.u, section.timestep_mean, section.timestep_std, section.timestep_shift
    ).to(device)
    cond = drop_captions(batch.condition.to(device), null, draws.drop.to(device))
    losses = flow_matching_loss(model, batch.latents.to(device), draws.eps.to(device), t, cond)
    if by_time is not None:
        by_time.add(t, losses)
    return losses
