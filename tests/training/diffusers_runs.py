"""Transformers of diffusers in two processes; apart from the tests, as these import more."""

import os
from functools import partial
from pathlib import Path

import tiny_diffusers as tiny
import torch
import torch.distributed as dist
from parallel_runs import CPU, Case, evenly, train
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm_core.backbones.diffusers_config import DiffusersConfig, read_diffusers_config
from ldm_core.backbones.diffusers_flow import DiffusersFlow
from ldm_core.training.layout import Layout
from ldm_core.training.recomputation import recompute_all, recompute_cheap
from ldm_core.training.shards import whole_weights
from pipelines.denoiser_network import arranged
from pipelines.recipe_options import Arguments

SHAPES = {
    "wan": {"in_channels": 2, "out_channels": 2, "text_dim": 5, "num_layers": 2},
    "pixart": {"in_channels": 2, "out_channels": 4, "caption_channels": 5},
    "hunyuan_video": {
        "in_channels": 2, "out_channels": 2, "text_embed_dim": 5, "pooled_projection_dim": 3
    },
}  # fmt: skip


def network_of(name: str) -> nn.Module:
    """With the weights of diffusers' module, for what `parallel_runs` trains on."""
    torch.manual_seed(0)
    model = tiny.FAMILIES[name](**SHAPES[name])
    content = {"_class_name": type(model).__name__, **model.config}
    network = DiffusersFlow(DiffusersConfig(transformer=content))
    network.load_state_dict(model.state_dict())
    return network


WAN, PIXART, HUNYUAN = (partial(network_of, name) for name in SHAPES)
CASES = {
    "shards of Wan, by Muon": Case(
        Layout(shard=2), make=WAN, shares=partial(evenly, parts=2), recompute=recompute_cheap,
        steps=3,
    ),
    "copies of PixArt": Case(Layout(replicate=2), make=PIXART, frames=1, steps=2),
    "shards of HunyuanVideo": Case(
        Layout(shard=2), make=HUNYUAN, recompute=recompute_all, muon=False, steps=2
    ),
}  # fmt: skip
COMPILED = Case(Layout(), make=WAN, compile=True, recompute=recompute_cheap, steps=2)


def dealt_out(folder: str, *words: str) -> dict[str, Tensor]:
    """The weights that shards begin with, put together again; only the first worker read them."""
    uri = f"{folder}/wan"
    words = ("train.backbone=diffusers", f"train.initial={uri}", "precision=fp32", *words)
    recipe = Arguments("image-tiny", overrides=words).resolve()
    parallel = arranged(recipe, read_diffusers_config(uri), Layout(shard=2), CPU)
    assert all(isinstance(weight, DTensor) for weight in parallel.network.parameters())
    whole = whole_weights(parallel.network.state_dict(), keep=True)
    buffers = {name: buffer.clone() for name, buffer in parallel.network.named_buffers()}
    return whole | {f"buffer {name}": buffer for name, buffer in buffers.items()}


def be_one_of_two(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    outcomes = {name: train(case).__dict__ for name, case in CASES.items()}
    outcomes["dealt out"] = dealt_out(folder)
    outcomes["dealt out with adapters"] = dealt_out(folder, "train.lora_rank=2")
    torch.save(outcomes, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
