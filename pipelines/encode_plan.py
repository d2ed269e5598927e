"""What the latent store is to hold, and with what it is made: decided before anything starts."""

from dataclasses import dataclass
from typing import Any

from ldm_core.autoencoders.autoencoder import AutoencoderFacts, autoencoder_facts
from ldm_core.files import absolute, exists, file_sizes, join
from ldm_core.latents.ledger import fingerprint
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.schema import bucket_name, caption_digest
from ldm_core.media.folder import Listing, list_captioned_images
from ldm_core.text.encoders import clip_digest, t5_digest
from ldm_core.text.tiny import build_tiny_text_encoders
from pipelines.recipes.schema import Recipe, check_size

CODE = "centred square 1"  # names what this code does to a picture; a change makes rows stale

Item = dict[str, Any]  # one picture on its way: id, uri, captions, fingerprint, then what is found


@dataclass(frozen=True)
class Job:
    """What a worker needs to know, the same for every shard."""

    store: str
    size: int
    batch_size: int
    autoencoder: str
    t5: str
    clip: str
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """The wanted rows.

    Attributes:
        job: what the workers are told.
        autoencoder: its digest and statistics.
        texts: the text encoders, "t5" and "clip".
        images: pictures to encode, by id.
        rejects: what the listing itself refused, by id.
        captions: the distinct captions, sorted, with the empty one.
    """

    job: Job
    autoencoder: AutoencoderFacts
    texts: tuple[EncoderEntry, ...]
    images: dict[str, Item]
    rejects: dict[str, Item]
    captions: list[str]

    def rows(self) -> dict[str, str]:
        """Fingerprint by id of everything `samples` and `rejects` are to hold."""
        return {id: item["fingerprint"] for id, item in (self.images | self.rejects).items()}

    def text_rows(self) -> dict[tuple[str, str], str]:
        """Encoder digest by (encoder, caption digest) of everything `texts` is to hold."""
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


def make_plan(recipe: Recipe, autoencoder: AutoencoderFacts) -> Plan:
    """List the folder and identify the encoders; builds the tiny text encoders if asked for.

    Raises:
        UserError: no usable pictures, or no text encoders.
    """
    listing = list_captioned_images(recipe.data)
    captions = sorted({text for image in listing.images for text in image.captions} | {""})
    _build_tiny_encoders(recipe, captions)
    job = Job(
        store=absolute(recipe.product("latents")),
        size=recipe.size,
        batch_size=recipe.encode.batch_size,
        autoencoder=_worker_uri(recipe.autoencoder_uri),
        t5=absolute(recipe.t5_uri),
        clip=absolute(recipe.clip_uri),
        max_tokens=recipe.text.max_tokens,
    )
    return Plan(
        job=job,
        autoencoder=autoencoder,
        texts=(
            EncoderEntry(name="t5", uri=job.t5, digest=t5_digest(job.t5, job.max_tokens)),
            EncoderEntry(name="clip", uri=job.clip, digest=clip_digest(job.clip, job.max_tokens)),
        ),
        images=_images(recipe, listing, autoencoder.digest),
        rejects=_refused(listing),
        captions=captions,
    )


def missing_tiny_encoders(recipe: Recipe) -> bool:
    """Whether tiny text encoders are asked for that nobody has built yet."""
    pairs = ((recipe.text.t5, recipe.t5_uri), (recipe.text.clip, recipe.clip_uri))
    wanted = [uri for source, uri in pairs if source == "tiny"]
    return not all(exists(join(uri, "tokenizer_config.json")) for uri in wanted)


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


def _images(recipe: Recipe, listing: Listing, encoder_digest: str) -> dict[str, Item]:
    sizes = file_sizes(recipe.data)
    bucket = bucket_name(recipe.size, recipe.size)
    return {
        image.id: {
            "id": image.id,
            "uri": image.uri,
            "captions": image.captions,
            "fingerprint": fingerprint(
                sizes.get(image.uri), image.captions, encoder_digest, bucket, CODE
            ),
        }
        for image in listing.images
    }


def _refused(listing: Listing) -> dict[str, Item]:
    """What the listing itself refused: rows of `rejects` that need no worker."""
    return {
        reject.id: {
            "id": reject.id,
            "uri": reject.uri,
            "stage": reject.stage,
            "reason": reject.reason,
            "detail": reject.detail,
            "fingerprint": fingerprint(reject.stage, reject.reason, reject.detail),
        }
        for reject in listing.rejects
    }
