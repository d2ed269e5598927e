"""Which transformer fits a recipe's train section and the latents it is for."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.dataset as ds
from torch import nn

from ldm_core.backbones.build import BackboneConfig
from ldm_core.backbones.build import new_backbone as new_backbone
from ldm_core.backbones.dit import DiTConfig
from ldm_core.backbones.mmdit import MMDiTConfig
from ldm_core.errors import UserError
from ldm_core.latents.store import StoreVersion
from ldm_core.media.buckets import Bucket
from pipelines.diffusers_backbone import LatentShape, checked, initial_backbone
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import TrainSection


@dataclass(frozen=True)
class LatentSpace:
    """What a transformer reads.

    Attributes:
        latents: bucket "HxWxT" -> shape of its latents; the first is the main one.
        text_width, pooled_width: channels of caption tokens and of pooled captions.
        max_tokens: the longest caption.
    """

    latents: Mapping[str, LatentShape]
    text_width: int
    pooled_width: int
    max_tokens: int

    @property
    def main(self) -> LatentShape:
        """Of the main bucket."""
        return next(iter(self.latents.values()))


def declared_space(recipe: Recipe) -> LatentSpace:
    """What the recipe says that it is for; nothing is opened.

    Raises:
        UserError: a bucket that the autoencoder's downsampling does not divide, or a video of a
            length that it cannot take.
    """
    names = recipe.train.buckets or (Bucket(recipe.size, recipe.size).name,)
    pixels = recipe.autoencoder.source == "identity"
    auto, text = recipe.autoencoder, recipe.text
    channels, down = (3, 1) if pixels else (auto.channels, auto.downsampling)
    stride = 1 if pixels else auto.temporal_downsampling
    return LatentSpace(
        {name: (channels, *_latent(Bucket.parse(name), down, stride)) for name in names},
        text.token_width,
        text.vector_width,
        text.max_tokens,
    )


def _latent(bucket: Bucket, down: int, stride: int) -> LatentShape:
    if bucket.height % down or bucket.width % down or (bucket.frames - 1) % stride:
        raise UserError(
            f"bucket {bucket.name} does not become whole latents at downsampling {down} and "
            f"temporal_downsampling {stride}: sides are to be multiples of {down}, frames 1 more "
            f"than a multiple of {stride}"
        )
    h, w = bucket.height // down, bucket.width // down
    frames = 1 + (bucket.frames - 1) // stride
    return (h, w) if bucket.frames == 1 else (frames, h, w)


def stored_space(version: StoreVersion) -> LatentSpace:
    """What a store holds, its fullest bucket first: a row of each is looked at."""
    manifest = version.manifest
    names = sorted(manifest.buckets, key=lambda name: -manifest.buckets[name])

    def first(table: str, column: str, condition: ds.Expression) -> list[int] | int:
        rows = version.store.dataset(table, manifest.tables[table])
        found = rows.head(1, columns=[column], filter=condition)
        value: list[int] | int = found[column][0].as_py()
        return value

    def latent(name: str) -> LatentShape:
        shape = first("samples", "latent_shape", ds.field("bucket") == name)
        assert isinstance(shape, list)
        return tuple(shape)

    tokens = first("texts", "tokens_shape", ds.field("tokens").is_valid())
    pooled = first("texts", "pooled_size", ds.field("pooled").is_valid())
    assert isinstance(tokens, list)
    assert isinstance(pooled, int)
    latents = {name: latent(name) for name in names}
    return LatentSpace(latents, tokens[1], pooled, manifest.max_tokens)


def backbone_config(
    section: TrainSection, latent: LatentShape, text_width: int, pooled_width: int
) -> BackboneConfig:
    """The transformer that fits latents (C, h, w) or (C, T, h, w) and embeddings of these widths.

    Raises:
        ValidationError: sizes that do not divide.
        UserError: a diffusers transformer that reads others.
    """
    if section.backbone == "diffusers":
        return checked(section, initial_backbone(section), latent, text_width, pooled_width)
    if section.backbone == "dit":
        return _dit(section, latent, text_width, pooled_width)
    head = section.width // section.heads
    return MMDiTConfig(
        in_channels=latent[0],
        patch_size=section.patch_size,
        width=section.width,
        depth=section.depth,
        heads=section.heads,
        single_depth=section.single_depth,
        **({} if section.mlp_ratio is None else {"mlp_ratio": section.mlp_ratio}),
        text_width=text_width,
        pooled_width=pooled_width,
        qk_norm=section.qk_norm,
        rotary=rotary_channels(head) if section.positions == "rotary" else None,
    )


def _dit(
    section: TrainSection, latent: LatentShape, text_width: int, pooled_width: int
) -> DiTConfig:
    videos = len(latent) == 4 or any(not name.endswith("x1") for name in section.buckets)
    pairs = section.width // section.heads // 2
    return DiTConfig(
        in_channels=latent[0],
        latent_size=(latent[-2], latent[-1]),
        patch_size=section.patch_size,
        width=section.width,
        depth=section.depth,
        heads=section.heads,
        **({} if section.mlp_ratio is None else {"mlp_ratio": section.mlp_ratio}),
        text_width=text_width,
        pooled_width=pooled_width,
        text_depth=section.text_depth,
        qk_norm=section.qk_norm,
        frame_pairs=2 * max(1, pairs // 8) if videos else 0,
    )


def rotary_channels(head: int) -> tuple[int, int, int]:
    """Channels of a head that turn with frame, row and column: an eighth with the frame, as Flux's
    (16, 56, 56) of 128, and more where the rest would be odd.
    """
    place = head * 7 // 16 // 2 * 2
    return head - 2 * place, place, place


def lists_of_blocks(network: nn.Module) -> list[nn.ModuleList]:
    """A transformer's lists of blocks, whose matrices are Muon's, in their order: all that lie in
    no other list.
    """
    found = []
    for child in network.children():
        found += [child] if isinstance(child, nn.ModuleList) else lists_of_blocks(child)
    return found
