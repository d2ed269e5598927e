"""A user's data, whatever form it has, as one listing of entries to encode and rejects."""

from collections.abc import Callable, Iterable

from ldm_core.errors import UserError
from ldm_core.media.entries import Candidate, Listing, media_kind, sort_out
from ldm_core.media.manifest_sample import Sampled, sample_manifests
from ldm_core.media.manifests import MANIFESTS, list_manifests
from ldm_core.media.media_folder import list_folder
from ldm_core.media.places import Place, find_place
from ldm_core.media.tar_shards import list_shards

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


def list_media(source: str) -> Listing:
    """List the pictures and videos of `source` with their captions.

    Args:
        source: local or any address fsspec knows, `s3://` first:
            a folder of media with captions in a table or in text files beside them;
            a WebDataset: a `.tar`, a folder of them, or a pattern with {000..009}, * or ?;
            a manifest: a `.parquet`, `.jsonl` or `.csv` file, or a folder of Parquet files.
            A folder that holds pictures or videos is a folder of media, whatever else it holds.

    A file's change is noticed by its modification time (a bucket's ETag) as well as its size, so
    a file that was only touched, or copied without its times, counts as changed.

    Raises:
        UserError: nothing is there, it cannot be read, or nothing in it is usable.
    """
    return _usable(_listed, source).listing


def look_at(source: str, most: int) -> Sampled:
    """About `most` rows of a source that is long manifests; all of every other one.

    Raises:
        UserError: nothing is there, it cannot be read, or no row that was looked at is usable.
    """

    def looked(place: Place) -> Sampled:
        sample = sample_manifests(place, most) if _lister(place) is list_manifests else None
        return sample or _listed(place)

    return _usable(looked, source)


def _usable(look: Callable[[Place], Sampled], source: str) -> Sampled:
    """What `look` finds at a source, which is walked once."""
    place = find_place(source)
    try:
        found = look(place)
    except PermissionError as error:
        raise UserError(f"{source} may not be read ({error}): check the credentials") from error
    if not found.listing.entries:
        raise UserError(_nothing_usable(found.listing, source))
    return found


def _listed(place: Place) -> Sampled:
    listing = sort_out(_lister(place)(place))
    count = len(listing.entries) + len(listing.rejects)
    return Sampled(listing, count, count)


def _lister(place: Place) -> Callable[[Place], Iterable[Candidate]]:
    """What reads a place of this form."""
    if place.is_folder and any(map(media_kind, place.files)):
        return list_folder
    packed = place.ending(*_COMPRESSED)
    if packed:
        raise UserError(
            f"{place.source}: {packed[0]} is compressed as a whole, so no sample of it can be "
            "read by itself: unpack it, or make a plain .tar of it (gunzip)"
        )
    if place.ending(".tar"):
        return list_shards
    if place.ending(".parquet") or (not place.is_folder and place.ending(*MANIFESTS)):
        return list_manifests
    if not place.is_folder:
        raise UserError(
            f"{place.source} is a file: name the folder that holds the pictures, a .tar, or a "
            "manifest (.parquet, .jsonl, .csv)"
        )
    return list_folder


def _nothing_usable(listing: Listing, source: str) -> str:
    if not listing.rejects:
        return f"{source} holds no pictures or videos"
    first = listing.rejects[0]
    detail = f" ({first.detail})" if first.detail else ""
    return (
        f"none of {len(listing.rejects)} entries of {source} is usable; the first, "
        f"{first.id!r}: {first.reason}{detail}. Files are named relative to the folder"
    )
