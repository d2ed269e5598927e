"""A project small enough for a unit test: text encoders and a model with random weights."""

from pathlib import Path

import torch

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.files import join
from ldm_core.model_directory import ModelConfig, Reference, save_model
from ldm_core.text.encoders import load_clip, load_t5
from ldm_core.text.tiny import build_tiny_text_encoders

SIZE, WIDTH, MAX_TOKENS = 8, 8, 12
IDENTITY = Reference(uri="identity", digest="identity")
CAPTIONS = ["a red cat", "a blue dog", "two green birds on a white wall"]


def backbone(flow_map: bool = False) -> DiTConfig:
    return DiTConfig(
        in_channels=3, latent_size=(SIZE, SIZE), patch_size=2, width=16, depth=1, heads=2,
        text_width=WIDTH, pooled_width=WIDTH, flow_map=flow_map,
    )  # fmt: skip


def random_network(config: DiTConfig, seed: int = 0) -> DiT:
    """A network whose zero-initialised parts are not zero."""
    torch.manual_seed(seed)
    network = DiT(config)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network.eval()


def text_references(root: str) -> dict[str, Reference]:
    """Tiny text encoders under `root`, made if they are not there."""
    t5, clip = join(root, "text/t5"), join(root, "text/clip")
    build_tiny_text_encoders(CAPTIONS, t5, clip, WIDTH)
    return {
        "t5": Reference(uri=t5, digest=load_t5(t5, MAX_TOKENS).digest),
        "clip": Reference(uri=clip, digest=load_clip(clip, MAX_TOKENS).digest),
    }


def model_config(
    texts: dict[str, Reference], kind: str = "teacher", autoencoder: Reference = IDENTITY
) -> ModelConfig:
    return ModelConfig(
        kind=kind,
        backbone=backbone(flow_map=kind == "student"),
        latents_mean=(0.1, -0.2, 0.05),
        latents_std=(0.2, 0.25, 0.3),
        sizes=(f"{SIZE}x{SIZE}",),
        autoencoder=autoencoder,
        **texts,
        max_tokens=MAX_TOKENS,
        steps=5 if kind == "teacher" else 2,
        guidance=1.5 if kind == "teacher" else 1.0,
        lineage={"run": "r1"},
    )


def tiny_project(root: str | Path, kind: str = "teacher") -> str:
    """Write encoders and a model under `root`; returns the model's URI."""
    config = model_config(text_references(str(root)), kind)
    uri = join(str(root), kind)
    save_model(uri, config, random_network(config.backbone).state_dict(), "# A card\n")
    return uri
