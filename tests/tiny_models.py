"""A teacher and a student of random weights, saved as model directories: seconds, not minutes."""

import torch

from ldm_core.backbones.dit import DiT, DiTConfig
from ldm_core.evaluation.prompts import evaluation_scenes
from ldm_core.model_directory import ModelConfig, Reference, save_model
from ldm_core.text.encoders import load_clip, load_t5
from ldm_core.text.tiny import build_tiny_text_encoders
from pipelines.recipes.schema import Recipe

WIDTH = 8


def save_tiny_models(recipe: Recipe, content: str = "") -> dict[str, str]:
    """Write `teacher` and `student` of the recipe, in pixel space; returns their digests.

    `content` is that of the store version they say they were trained on.
    """
    captions = [scene.caption for scene in evaluation_scenes("double", 16, 0)]
    build_tiny_text_encoders(captions, recipe.t5_uri, recipe.clip_uri, WIDTH)
    t5 = load_t5(recipe.t5_uri, recipe.text.max_tokens)
    clip = load_clip(recipe.clip_uri, recipe.text.max_tokens)
    backbone = DiTConfig(
        in_channels=3,
        latent_size=(recipe.size, recipe.size),
        patch_size=8,
        width=16,
        depth=1,
        heads=2,
        text_width=t5.width,
        pooled_width=clip.width,
    )
    teacher = ModelConfig(
        kind="teacher",
        backbone=backbone,
        latents_mean=(0.0,) * 3,
        latents_std=(0.5,) * 3,
        sizes=(f"{recipe.size}x{recipe.size}",),
        autoencoder=Reference(uri="identity", digest="identity"),
        t5=Reference(uri=recipe.t5_uri, digest=t5.digest),
        clip=Reference(uri=recipe.clip_uri, digest=clip.digest),
        max_tokens=recipe.text.max_tokens,
        steps=recipe.evaluate.teacher_steps,
        guidance=2.0,
        lineage={"run": "teacher-run", "store": "/store", "store_content": content},
    )
    student = teacher.model_copy(
        update={
            "kind": "student",
            "backbone": backbone.model_copy(update={"flow_map": True}),
            "steps": 4,
            "guidance": 1.0,
            "lineage": {"run": "student-run", "teacher": "0123", "teacher_run": "teacher-run"},
        }
    )
    return {config.kind: _save(recipe, config) for config in (teacher, student)}


def _save(recipe: Recipe, config: ModelConfig) -> str:
    torch.manual_seed(0)
    network = DiT(config.backbone)
    with torch.no_grad():  # a fresh network's output is zero, whatever it is asked
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return save_model(recipe.product(config.kind), config, network.state_dict(), "a card")
