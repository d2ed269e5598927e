"""A diffusers transformer as training, samplers and serving take a network: it gives the flow's
velocity, whatever it predicts itself, and its weights have the names that diffusers gives them.
"""

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork
from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.change_of_process import flow_velocity
from ldm_core.errors import UserError


class DiffusersFlow(nn.Module):
    """(x_t, t, captions) -> eps - x0 of x_t = (1 - t) x0 + t eps.

    Its parts are the model's own, under the same names: what is trained, sharded, adapted and saved
    here is diffusers' module.

    Attributes:
        config: what the model is.
        model: the module of diffusers itself; no part of this one, or every name would come twice.
    """

    def __init__(self, config: DiffusersConfig) -> None:
        """Of fresh weights.

        Raises:
            UserError: a table of betas or a prediction that is not known here.
        """
        super().__init__()
        self.config = config
        model = _new(config)
        with torch.device("cpu"):  # a table of betas is real, also where the weights are not
            self._raw = (DiffusersNetwork(model, config.scheduler),)  # in a tuple: no child
        self._modules, self._parameters = self.model._modules, self.model._parameters
        self._buffers = self.model._buffers
        self._non_persistent_buffers_set = self.model._non_persistent_buffers_set
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # what is random in training depends on seed, step and sample alone

    @property
    def model(self) -> Any:
        """The module of diffusers."""
        return self._raw[0].model

    def forward(self, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
        """The velocity at time `t`.

        Args:
            x_t: (B, C, H, W) or (B, C, T, H, W) noisy latents; a picture is a video of one frame.
            t: (B,) in (0, 1], noise at 1.
            cond: B captions.

        Returns:
            The shape of `x_t`.

        Raises:
            UserError: a video for a model of pictures, or what the model cannot take.
        """
        [raw] = self._raw
        velocity = flow_velocity(raw, raw.process, raw.prediction, self._shaped(x_t), t, cond)
        return velocity.reshape(x_t.shape)

    def _shaped(self, x_t: Tensor) -> Tensor:
        if self.config.facts.videos:
            return x_t if x_t.ndim == 5 else x_t.unsqueeze(2)
        if x_t.ndim == 5 and x_t.shape[2] > 1:
            raise UserError(
                f"{x_t.shape[2]} frames for a {self.config.class_name}, which is of pictures: give "
                "it one, or choose a model of videos"
            )
        return x_t.flatten(1, 2) if x_t.ndim == 5 else x_t


def _new(config: DiffusersConfig) -> Any:
    return getattr(diffusers, config.class_name).from_config(config.transformer)
