"""What `ldm store` prints of a store: its versions, and what is in one of them."""

from ldm_core.errors import UserError
from ldm_core.latents.manifest import Manifest
from ldm_core.latents.store import LatentStore, StoreVersion
from pipelines.credentials import masked
from pipelines.text_tables import Cell, byte_size, print_table

_ARRAY_BYTES = 2  # of a value


def print_versions(store: LatentStore) -> None:
    """A line for each published version."""
    rows = [_version_row(store, number) for number in store.versions()]
    columns = ("version", "created (UTC)", "rows", "size", "samples", "rejects", "captions",
               "content")  # fmt: skip
    print_table(f"versions of {masked(store.uri)}", columns, rows)


def _version_row(store: LatentStore, number: int) -> list[Cell]:
    try:
        manifest = store.open_version(number).manifest
    except UserError:  # of another program's format
        return [str(number), "in another format", "", "", "", "", "", ""]
    samples, rejects = manifest.counts["samples"], manifest.counts["rejects"]
    created = manifest.created[:16].replace("T", " ")
    return [
        str(number), created, samples + rejects, byte_size(manifest.bytes),
        samples, rejects, _captions(manifest), manifest.content,
    ]  # fmt: skip


def _captions(manifest: Manifest) -> int:
    return manifest.counts["texts"] // max(len(manifest.texts), 1)


def print_version(version: StoreVersion) -> None:
    """Buckets, encoders, rejects and the embeddings' bytes of a version."""
    manifest = version.manifest
    number = version.number
    print_table(
        f"buckets of version {number}", ("bucket", "samples"), list(manifest.buckets.items())
    )
    encoders = [
        (entry.name, entry.digest, masked(entry.uri))
        for entry in (manifest.autoencoder, *manifest.texts)
    ]
    print_table(f"encoders of version {number}", ("encoder", "digest", "URI"), encoders)
    if manifest.rejects:
        rows = list(manifest.rejects.items())
        print_table(f"rejects of version {number}", ("reason", "files"), rows)
    print_table(f"bytes of a caption in version {number}", ("", "bytes"), _text_rows(version))


def _text_rows(version: StoreVersion) -> list[tuple[str, int]]:
    """What a caption's embeddings take: on disk, unpacked, and had they been padded."""
    manifest = version.manifest
    unpacked = padded = 0
    for batch in version.batches("texts", ["tokens_shape", "pooled_size"]):
        for row in batch.to_pylist():
            length, width = row["tokens_shape"] or (0, 0)
            pooled = row["pooled_size"] or 0
            unpacked += _ARRAY_BYTES * (length * width + pooled)
            padded += _ARRAY_BYTES * (manifest.max_tokens * width + pooled)
    captions = max(_captions(manifest), 1)
    stored = version.store.bytes("texts", manifest.tables["texts"])
    return [
        ("in the files, compressed", stored // captions),
        ("in 16 bits, at its own length", unpacked // captions),
        (f"in 16 bits, padded to {manifest.max_tokens} tokens", padded // captions),
    ]
