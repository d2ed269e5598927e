"""Captioned pictures only, for what does not take videos or weights."""

from dataclasses import dataclass

from ldm_core.errors import UserError
from ldm_core.media.entries import Reject
from ldm_core.media.locators import read_media
from ldm_core.media.sources import list_media

__all__ = ["CaptionedImage", "Listing", "Reject", "list_captioned_images", "read_bytes"]


@dataclass(frozen=True)
class CaptionedImage:
    """One picture to encode; `id` is its path relative to the folder, with forward slashes."""

    id: str
    uri: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Every picture found and every file named, each in exactly one of the two, sorted by id."""

    images: list[CaptionedImage]
    rejects: list[Reject]


def list_captioned_images(folder: str) -> Listing:
    """What `list_media` lists, without videos, which are rejects, and without weights.

    Raises:
        UserError: as `list_media`, and if there are no pictures.
    """
    media = list_media(str(folder))
    videos = [
        Reject(entry.id, entry.uri, "list", "not an image file")
        for entry in media.entries
        if entry.kind == "video"
    ]
    images = [
        CaptionedImage(entry.id, entry.uri, tuple(caption.text for caption in entry.captions))
        for entry in media.entries
        if entry.kind == "image"
    ]
    if not images:
        raise UserError(f"{folder} holds {len(videos)} videos but no pictures")
    return Listing(images, sorted(media.rejects + videos, key=lambda reject: reject.id))


def read_bytes(uri: str) -> bytes:
    """The bytes of one picture, local or remote."""
    return read_media(uri)
