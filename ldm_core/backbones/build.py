"""A network of a configuration, of whichever kind it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldm_core.backbones.diffusers_config import DiffusersConfig
from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig

if TYPE_CHECKING:
    from ldm_core.backbones.diffusers_flow import DiffusersFlow

BackboneConfig: TypeAlias = DiTConfig | MMDiTConfig | DiffusersConfig
Backbone: TypeAlias = "DiT | MMDiT | DiffusersFlow"


def new_backbone(config: BackboneConfig) -> Backbone:
    """The network of a config, with fresh weights."""
    match config:
        case DiTConfig():
            return DiT(config)
        case MMDiTConfig():
            return MMDiT(config)
        case DiffusersConfig():
            from ldm_core.backbones.diffusers_flow import DiffusersFlow  # here: it takes seconds

            return DiffusersFlow(config)


@contextmanager
def without_weights() -> Iterator[None]:
    """Networks that are built inside have their parameters on the meta device. What they compute
    themselves, such as positions, is real: no state holds it.
    """

    def emptied(_: nn.Module, __: str, weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(weight.to("meta"), weight.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
