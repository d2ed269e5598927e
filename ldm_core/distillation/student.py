"""A few-step student: what it begins as, and which loss each training step takes.

guidance distillation (Meng et al. 2023): one conditional pass learns what two gave
-> trajectory distillation: one leap learns several guided teacher steps (Salimans & Ho 2022)
-> every fourth step a longer leap learns two of the student's own (Frans et al. 2025, Eq. 4)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm_core.backbones.dit import DiT
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import DenoiserLike
from ldm_core.diffusion.flow_map import AverageVelocity
from ldm_core.diffusion.process import add_noise
from ldm_core.diffusion.timesteps import logit_normal
from ldm_core.distillation.guidance import guidance_distillation_loss
from ldm_core.distillation.shortcut import shortcut_loss
from ldm_core.distillation.trajectory import euler_slope, trajectory_loss
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance
from ldm_core.training.draws import Draws

Phase = Literal["guidance", "trajectory", "shortcut"]
Loss = Callable[[Tensor, Draws, TextCondition], Tensor]
"""(x0 (B, C, H, W), draws, cond) -> (B,)."""


def student_of(teacher: DiT) -> DiT:
    """A flow-map network with the teacher's weights; it equals the teacher for every interval.

    Only the interval's embedding is new, and its last layer starts at zero.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same new weights on every worker
        student = DiT(teacher.config.model_copy(update={"flow_map": True}))
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student


@dataclass(frozen=True)
class DistillationLosses:
    """Which loss a step takes, and the losses.

    Attributes:
        student: trained.
        averaged: its EMA, which sets the aim of the longer leaps.
        teacher: trained with captions dropped; not guided.
        null: the empty caption, a batch of one.
        guidance: the scale that the student reproduces at 1.
        guidance_steps: training steps that learn the guidance alone.
        student_steps: the most steps the student is to need, a power of two.
        teacher_substeps: teacher Euler steps that span one of the student's.
    """

    student: AverageVelocity
    averaged: AverageVelocity
    teacher: DenoiserLike
    null: TextCondition
    guidance: float
    guidance_steps: int
    student_steps: int
    teacher_substeps: int

    def at(self, step: int) -> tuple[Phase, Loss]:
        """Phase and loss of a step: guidance first, then leaps, every fourth a longer one."""
        if step < self.guidance_steps:
            return "guidance", self._guidance
        if step % 4 == 3 and self.student_steps > 1:
            return "shortcut", self._shortcut
        return "trajectory", self._trajectory

    def _guidance(self, x0: Tensor, draws: Draws, cond: TextCondition) -> Tensor:
        def velocity(x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
            return self.student(x_t, t, t, cond)

        t = logit_normal(draws.u).to(x0)
        x_t = add_noise(self.teacher.process, x0, draws.eps.to(x0), t)
        return guidance_distillation_loss(
            velocity, self.teacher, x_t, t, cond, self.null, self.guidance
        )

    def _trajectory(self, x0: Tensor, draws: Draws, cond: TextCondition) -> Tensor:
        x_t, t, r = self._leap(x0, draws, self.student_steps)
        guided = ClassifierFreeGuidance(self.teacher, self.guidance, self.null).velocity
        return trajectory_loss(
            self.student, guided, x_t, t, r, cond, self.teacher_substeps, euler_slope
        )

    def _shortcut(self, x0: Tensor, draws: Draws, cond: TextCondition) -> Tensor:
        levels = self.student_steps.bit_length() - 1
        halvings = 1 + (draws.v * levels).floor().clamp(max=levels - 1)  # a sample's own: (B,)
        x_t, t, r = self._leap(x0, draws, self.student_steps / 2**halvings)
        return shortcut_loss(self.student, self.averaged, x_t, t, r, cond)

    def _leap(
        self, x0: Tensor, draws: Draws, steps: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t, r of one of the `steps` equal leaps from 1 to 0, each equally likely."""
        steps = torch.as_tensor(steps).to(x0)
        index = torch.minimum((draws.u.to(x0) * steps).floor(), steps - 1)
        t, r = (index + 1) / steps, index / steps
        return add_noise(self.teacher.process, x0, draws.eps.to(x0), t), t, r
