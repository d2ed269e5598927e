"""A part of a window -> what a training step reads."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import threshold

from ldm_core.conditioning.text import TextCondition
from ldm_core.latents.posterior import posterior_noise
from ldm_core.latents.reader import LatentBatch
from ldm_core.reading.loading import Window

# Below this log-variance the draw is lost in the rounding of 16-bit means.
_NO_SPREAD = -30.0


def batch_of(
    window: Window, start: int, end: int, seed: int, mean: Tensor, std: Tensor
) -> LatentBatch:
    """The samples of a window from start to end: drawn from the posterior and normalised.

    Args:
        window: in memory.
        start, end: of its samples.
        seed: of the run.
        mean, std: (C,) float32, by which the latents are normalised.
    """
    rows = slice(start, end)
    latents, logvars = window.means[rows].float(), window.logvars[rows].float()
    keys = window.keys[rows]
    if float(logvars.max()) > _NO_SPREAD:
        # exp of -inf is 0: a sample's draw must not depend on whether its neighbours have spread
        spread = threshold(logvars, _NO_SPREAD, -math.inf).mul_(0.5).exp_()
        noise = posterior_noise(seed, window.turns[rows], keys, tuple(latents.shape[1:]))
        latents.addcmul_(noise, spread)
    channel = (-1, *(1 for _ in latents.shape[2:]))
    which = window.text[rows]
    return LatentBatch(
        latents=latents.sub_(mean.view(channel)).div_(std.view(channel)),
        condition=window.texts.condition(which),
        ids=keys,
        captions=window.texts.names(which),
    )


def joined(parts: Sequence[LatentBatch]) -> LatentBatch:
    """One batch of all the samples."""
    if len(parts) == 1:
        return parts[0]
    return LatentBatch(
        latents=torch.cat([part.latents for part in parts]),
        condition=TextCondition.cat([part.condition for part in parts]),
        ids=torch.cat([part.ids for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
    )
