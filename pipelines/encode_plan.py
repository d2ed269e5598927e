"""What the latent store is to hold, and with what it is made: decided before anything starts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from ldm_core.autoencoders.autoencoder import AutoencoderFacts, autoencoder_facts
from ldm_core.autoencoders.tiling import check_tile
from ldm_core.files import absolute, exists, join
from ldm_core.latents.ledger import fingerprint
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.schema import ARRAY_DTYPE, caption_digest, caption_rows, captions_digest
from ldm_core.latents.stored import stored_as
from ldm_core.media.buckets import Geometry, causal_lengths
from ldm_core.media.entries import Listing, MediaEntry, Reject
from ldm_core.media.locators import cell_place
from ldm_core.media.parts import ClipRule
from ldm_core.media.sources import list_media
from ldm_core.text.encoders import describe_clip
from ldm_core.text.tiny import build_tiny_text_encoders
from ldm_core.text.token_encoders import describe_tokens
from ldm_core.text.uris import placed
from pipelines.encode_storage import mounts_of, witnesses
from pipelines.recipes.schema import Recipe, check_size
from pipelines.recipes.sections import EncodeSection

WITNESSES = 3  # files of each storage
# What this code does to media, and to videos beside; another name makes their rows stale.
CODE, OF_VIDEOS = "buckets 1", "as shown, in sRGB"
_USUAL = {"precision": "fp32", "tile": None, "flip": False}

Item = dict[str, Any]  # a file or a part of one on its way, with what is found about it


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, the same for every shard.

    Attributes:
        witnesses: locators of a few files of each storage: who cannot read any lacks it.
        mounts: of local files, see `mounts_of`.
    """

    store: str
    geometry: Geometry
    clips: ClipRule
    batch_size: int
    autoencoder: str
    t5: str
    clip: str
    max_tokens: int
    clip_tokens: bool = False
    text_dtype: str = "float16"
    channels_last: bool = True
    precision: str = "fp32"
    tile: int | None = None
    flip: bool = False
    item_seconds: float = 120.0
    item_bytes: int = 4 << 30
    witnesses: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()

    @property
    def unusual(self) -> dict[str, Any]:
        """What decides latents and is not as it was before it could be chosen."""
        chosen = {"precision": self.precision, "tile": self.tile, "flip": self.flip}
        return {k: chosen[k] for k, usual in _USUAL.items() if chosen[k] != usual}


@dataclass(frozen=True)
class Plan:
    """The wanted rows.

    Attributes:
        job: what the workers are told.
        autoencoder: its digest and statistics.
        texts: the text encoders, "t5" and "clip".
        entries: files to encode, by id.
        rejects: what the listing itself refused, by id.
        token_bytes: the most of a caption's tokens in 16 bits, by encoder.
    """

    job: Job
    autoencoder: AutoencoderFacts
    texts: tuple[EncoderEntry, ...]
    entries: dict[str, Item]
    rejects: dict[str, Item]
    token_bytes: Mapping[str, int]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """By file id, of everything `samples` and `rejects` are to hold."""
        return {id: item["fingerprint"] for id, item in (self.entries | self.rejects).items()}

    @cached_property
    def captions_digests(self) -> dict[str, str]:
        """By file id, of the captions."""
        return {
            id: captions_digest(caption_rows(item["captions"])) for id, item in self.entries.items()
        }

    @cached_property
    def captions(self) -> list[str]:
        """The distinct captions, sorted, with the empty one."""
        return _captions(self.entries)

    def text_rows(self) -> dict[tuple[str, str], str]:
        """What made it, by (encoder, caption digest) of everything `texts` is to hold."""
        return {
            (entry.name, caption_digest(caption)): entry.digest
            for entry in self.texts
            for caption in self.captions
        }


def describe_autoencoder(recipe: Recipe) -> AutoencoderFacts:
    """What the driver is to know of the recipe's autoencoder.

    Raises:
        UserError: there is none, or it cannot take the recipe's size.
    """
    autoencoder = autoencoder_facts(_worker_uri(recipe.autoencoder_uri))
    check_size(recipe.size, autoencoder.downsampling)
    return autoencoder


def make_plan(
    recipe: Recipe, autoencoder: AutoencoderFacts, listing: Listing | None = None
) -> Plan:
    """List the source and identify the encoders; builds the tiny text encoders if asked for.

    Args:
        recipe: with its places made absolute.
        autoencoder: what the driver knows of it.
        listing: of the source, if it is known already.

    Raises:
        UserError: no usable media, no text encoders, or a geometry the autoencoder cannot take.
    """
    job = encode_job(recipe, autoencoder)
    listing = listing or list_media(recipe.data)
    entries = {entry.id: _entry(entry, _decisive(job, autoencoder)) for entry in listing.entries}
    _build_tiny_encoders(recipe, _captions(entries))
    texts, token_bytes = _texts(job)
    uris = [entry.uri for entry in listing.entries]
    mounts = mounts_of(uris)
    job = replace(job, mounts=mounts, witnesses=witnesses(uris, mounts, WITNESSES))
    return Plan(job, autoencoder, texts, entries, _refused(listing), token_bytes)


def _texts(job: Job) -> tuple[tuple[EncoderEntry, ...], dict[str, int]]:
    """The text encoders, and the most of a caption's tokens by each, as `Plan` has them."""
    t5 = describe_tokens(job.t5, job.max_tokens)
    clip = describe_clip(job.clip, job.max_tokens, job.clip_tokens)
    # a pooled vector alone stays in 16 bits
    dtype = job.text_dtype if job.clip_tokens else ARRAY_DTYPE
    entries = (
        EncoderEntry(name="t5", uri=job.t5, digest=stored_as(t5.digest, job.text_dtype)),
        EncoderEntry(
            name="clip", uri=job.clip, digest=stored_as(clip.digest, dtype, job.clip_tokens)
        ),
    )
    with_tokens = {"t5": t5} | ({"clip": clip} if job.clip_tokens else {})
    return entries, {name: 2 * each.max_tokens * each.width for name, each in with_tokens.items()}


def missing_tiny_encoders(recipe: Recipe) -> bool:
    """Whether tiny text encoders are asked for that nobody has built yet."""
    pairs = ((recipe.text.t5, recipe.t5_uri), (recipe.text.clip, recipe.clip_uri))
    wanted = [uri for source, uri in pairs if source == "tiny"]
    return not all(exists(join(uri, "tokenizer_config.json")) for uri in wanted)


def with_tiny_encoders(recipe: Recipe, listing: Listing, folder: str) -> Recipe:
    """The recipe with tiny text encoders in a folder of their own, to measure with: those it asks
    for, of the listing's captions."""
    captions = {caption.text for entry in listing.entries for caption in entry.captions} | {""}
    uris = {name: join(folder, name) for name in ("t5", "clip")}
    build_tiny_text_encoders(
        captions, uris["t5"], uris["clip"], recipe.text.tiny_width, recipe.seed
    )
    tiny = {name: uri for name, uri in uris.items() if getattr(recipe.text, name) == "tiny"}
    return recipe.model_copy(update={"text": recipe.text.model_copy(update=tiny)})


def encode_job(recipe: Recipe, autoencoder: AutoencoderFacts) -> Job:
    """What the recipe's encode section tells the workers.

    Raises:
        UserError: a geometry or tiles that the autoencoder cannot take.
    """
    section, multiple = recipe.encode, autoencoder.temporal_downsampling or 1
    if section.tile:
        check_tile(section.tile, autoencoder.downsampling)
    return Job(
        store=absolute(recipe.product("latents")),
        geometry=Geometry(
            size=recipe.size,
            multiple=autoencoder.downsampling * recipe.train.patch_size,
            max_aspect=section.max_aspect,
            upscale=section.upscale,
            frames=causal_lengths(section.frames, multiple),
        ),
        clips=_clip_rule(section, multiple),
        batch_size=section.batch_size,
        autoencoder=_worker_uri(recipe.autoencoder_uri),
        t5=placed(recipe.t5_uri, absolute),
        clip=placed(recipe.clip_uri, absolute),
        max_tokens=recipe.text.max_tokens,
        clip_tokens=recipe.text.clip_tokens,
        text_dtype=section.text_dtype,
        channels_last=section.channels_last,
        precision=section.precision,
        tile=section.tile,
        flip=section.flip,
        item_seconds=section.item_seconds,
        item_bytes=int(section.item_gib * 2**30),
    )


def _clip_rule(section: EncodeSection, multiple: int) -> ClipRule:
    return ClipRule(section.fps, section.frames, section.stride, multiple, section.cut_at_scenes)


def _decisive(job: Job, autoencoder: AutoencoderFacts) -> dict[str, list[object]]:
    """What decides the latents of every file of a kind, but for its bytes."""
    geometry: list[object] = [autoencoder.digest, asdict(job.geometry), CODE]
    geometry += [job.unusual] if job.unusual else []  # else rows of earlier programs stay current
    still = geometry.copy()
    still[1] = asdict(job.geometry) | {"frames": (1,)}  # how videos are cut is no matter of theirs
    return {"image": still, "video": [*geometry, asdict(job.clips), OF_VIDEOS]}


def _entry(entry: MediaEntry, decisive: dict[str, list[object]]) -> Item:
    return {
        "id": entry.id,
        "uri": entry.uri,
        "kind": entry.kind,
        "size": entry.size,  # None where the listing does not tell
        "captions": [(caption.text, caption.weight) for caption in entry.captions],
        "fingerprint": fingerprint(entry.size, entry.etag, decisive[entry.kind]),
    }


def _captions(entries: dict[str, Item]) -> list[str]:
    return sorted({text for item in entries.values() for text, _ in item["captions"]} | {""})


def as_they_lie(item: Item) -> tuple[str, int, int, str]:
    """Sorts files: rows of one Parquet row group side by side, for it is read as a whole."""
    return (*cell_place(item["uri"]), item["source"] if "source" in item else item["id"])


def _build_tiny_encoders(recipe: Recipe, captions: list[str]) -> None:
    """Make the tiny text encoders once; those that are there stay, whatever captions come."""
    if not missing_tiny_encoders(recipe):
        return
    build_tiny_text_encoders(
        captions,
        recipe.product("text/t5"),
        recipe.product("text/clip"),
        recipe.text.tiny_width,
        recipe.seed,
    )


def _worker_uri(uri: str) -> str:
    """Workers run in folders of their own, so local paths are made absolute."""
    return uri if uri == "identity" else absolute(uri)


def _refused(listing: Listing) -> dict[str, Item]:
    """What the listing itself refused: rows of `rejects` that need no worker."""
    return {reject.id: _reject(reject) for reject in listing.rejects}


def _reject(reject: Reject) -> Item:
    return {
        **asdict(reject),
        "source": reject.id,
        "part": 0,
        "parts": 1,
        "fingerprint": fingerprint(reject.stage, reject.reason, reject.detail),
    }
