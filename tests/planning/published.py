"""Predictions beside figures that others published, at the plan's own assumptions.

Networks are diffusers', on the meta device. Nothing here was fitted to the figures; what the others
did not say (checkpointing, micro-batches) is what their users' guides do by default.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import diffusers
import torch

from ldm_core.conditioning.text import TextCondition
from ldm_core.planning.accelerators import accelerator
from ldm_core.planning.forward_pass import Checkpointing, ForwardPass, measure_forward
from ldm_core.planning.step import Sample, Step
from ldm_core.planning.step_time import StepTime, step_time
from ldm_core.planning.weights import Weights, weights_of
from ldm_core.training.layout import Layout


@dataclass(frozen=True)
class Published:
    """A figure: samples/s of one device, by whom, on what, and how the work was shared.

    Attributes:
        tflops: of one device, where that was published instead.
    """

    name: str
    build: Callable[[], tuple[torch.nn.Module, tuple]]
    tokens: int
    on: str
    layout: Layout
    micro_batches: int
    micro_samples: int
    checkpointing: Checkpointing
    samples_per_second: float | None = None
    tflops: float | None = None

    def predicted(self) -> tuple[StepTime, Sample, int]:
        """The step's time, its sample and the network's parameters."""
        weights, forward = measured(self.build)
        sample = Sample("any", self.tokens, 0, forward)
        step = Step(
            weights, (sample,), self.layout, self.micro_batches, {"any": self.micro_samples},
            "adamw", 0, 2, self.checkpointing,
        )  # fmt: skip
        return step_time(step, sample, accelerator(self.on)), sample, weights.total

    def ratio(self, time: StepTime) -> float:
        """Predicted over published speed."""
        if self.tflops is not None:
            return time.tflops / self.tflops
        assert self.samples_per_second is not None
        return time.samples_per_second / time.devices / self.samples_per_second

    def achieved(self, time: StepTime) -> float:
        """TFLOP/s of one device that the published figure amounts to."""
        return time.tflops / self.ratio(time)


@cache
def measured(build: Callable[[], tuple[torch.nn.Module, tuple]]) -> tuple[Weights, ForwardPass]:
    """Of the network and inputs that `build` gives."""
    with torch.device("meta"):
        network, given = build()
        return weights_of(network), measure_forward(network, *given, autocast=torch.bfloat16)


class _Wan(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = diffusers.WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=1,
            text_dim=4096, in_channels=16, out_channels=16,
        )  # fmt: skip
        blocks = self.model.blocks  # copies come sooner than layers that are initialised
        blocks.extend(deepcopy(blocks[0]) for _ in range(39))

    def forward(self, x, t, tokens):
        return self.model(x, t, tokens, return_dict=False)[0]


def wan_14b():
    return _Wan(), (torch.empty(1, 16, 24, 60, 104), torch.empty(1), torch.empty(1, 512, 4096))


def flux(tokens: int = 4096):
    from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig

    config = MMDiTConfig(
        in_channels=16, patch_size=2, width=3072, depth=19, single_depth=38, heads=24,
        text_width=4096, pooled_width=768, rotary=(16, 56, 56),
    )  # fmt: skip
    mask = torch.ones(1, 512, dtype=torch.bool)
    caption = TextCondition(torch.empty(1, 512, 4096), mask, torch.empty(1, 768))
    side = int(tokens**0.5) * 2
    return MMDiT(config), (torch.empty(1, 16, side, side), torch.empty(1), caption)


class _UNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
            block_out_channels=(320, 640, 1280, 1280), use_linear_projection=True,
        )  # fmt: skip

    def forward(self, x, t, tokens):
        return self.model(x, t, tokens, return_dict=False)[0]


def sd2(side: int):
    return _UNet(), (torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, 1024))


SD2_SMALL, SD2_LARGE = partial(sd2, 32), partial(sd2, 64)


def dit_xl():
    from ldm_core.backbones.class_dit import ClassDiT, ClassDiTConfig

    labels = torch.empty(1, dtype=torch.long)
    network = ClassDiT(ClassDiTConfig())
    network._check_labels = lambda labels: None  # they have no values here
    return network, (torch.empty(1, 4, 32, 32), torch.empty(1), labels)


FIGURES = (
    Published("Wan-14B, 128 H100, Megatron", wan_14b, 37440, "H100-80", Layout(1, 32, 4),
              32, 1, "full", tflops=325.8),
    Published("Wan-14B, 64 H100, FSDP2", wan_14b, 37440, "H100-80", Layout(1, 64, 1),
              64, 1, "full", tflops=228.9),
    Published("Wan-14B, 8 H100, FSDP2", wan_14b, 37440, "H100-80", Layout(1, 8, 1),
              8, 1, "full", tflops=176.0),
    Published("Flux-12B, 32 H100, 1024 px", flux, 4096, "H100-80", Layout(1, 32, 1),
              32, 8, "full", samples_per_second=256 / 15 / 32),
    Published("SD2, 8 A100, 256 px", SD2_SMALL, 1024, "A100-80", Layout(8, 1, 1),
              8, 256, "none", samples_per_second=1100 / 8),
    Published("SD2, 8 A100, 512 px", SD2_LARGE, 4096, "A100-80", Layout(8, 1, 1),
              8, 256, "none", samples_per_second=290 / 8),
    Published("DiT-XL/2, 1 A100, 256 px", dit_xl, 256, "A100-80", Layout(1, 1, 1),
              1, 128, "full", samples_per_second=107),
)  # fmt: skip


def lines(figure: Published) -> str:
    """A row of the comparison."""
    time, sample, parameters = figure.predicted()
    achieved = figure.achieved(time)
    return (
        f"{figure.name:<28} {parameters / 1e9:6.3f} B  {3 * sample.forward.flops / 1e12:9.2f} "
        f"TFLOP a sample; TFLOP/s published {achieved:4.0f} = {achieved / time.on.tflops:4.0%}"
        f"  predicted {time.tflops:4.0f} = {time.mfu:4.0%}  ratio {figure.ratio(time):.2f}"
    )


if __name__ == "__main__":
    for figure in FIGURES:
        print(lines(figure))
