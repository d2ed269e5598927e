"""Everything random in a training step, as a function of (seed, step, sample id).

No generator is carried along, so the draws do not depend on worker count or restarts.
"""

from dataclasses import dataclass

from torch import Tensor

from ldm_core import random


@dataclass(frozen=True)
class Draws:
    """For a batch of B latents: eps (B, C, H, W), u (B,) and v (B,) uniform, drop (B,) bool."""

    eps: Tensor
    u: Tensor
    v: Tensor
    drop: Tensor


def draw(seed: int, step: int, ids: Tensor, shape: tuple[int, ...], caption_drop: float) -> Draws:
    """Draw noise, two uniforms and the caption drop for the samples `ids` (B,) at `step`.

    Args:
        seed: of the run.
        step: global optimiser step.
        ids: int64 sample ids; a sample's draws do not depend on its neighbours.
        shape: (C, H, W) of one latent.
        caption_drop: probability that a caption is replaced by the empty one.
    """
    return Draws(
        eps=random.normal(seed, "noise", step, ids, shape),
        u=random.uniform(seed, "timestep", step, ids, ()),
        v=random.uniform(seed, "interval", step, ids, ()),
        drop=random.uniform(seed, "caption-drop", step, ids, ()) < caption_drop,
    )
