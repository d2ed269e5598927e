"""Some samples of a latent store as pictures again: the check that only eyes can do."""

import io

import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image

from ldm_core.autoencoders.autoencoder import Autoencoder, load_autoencoder
from ldm_core.errors import UserError
from ldm_core.files import write_bytes
from ldm_core.generation import grid_image
from ldm_core.latents.reader import sample_key
from ldm_core.latents.schema import decode_array
from ldm_core.latents.store import StoreVersion
from ldm_core.media.pixels import to_image

PICTURES, COLUMNS = 16, 4


def write_preview(version: StoreVersion, file: str) -> str:
    """Decode 16 samples of the largest bucket, of a video its first frame, into one PNG.

    Which ones is a function of their ids: another version with the same samples shows the same.

    Returns:
        What is on it, in words.

    Raises:
        UserError: the autoencoder is not at its URI, or another one is.
    """
    entry = version.manifest.autoencoder
    autoencoder = load_autoencoder(entry.uri)
    if autoencoder.digest != entry.digest:
        raise UserError(
            f"the autoencoder at {entry.uri} has digest {autoencoder.digest}, version "
            f"{version.number} was made with {entry.digest}: put that one back to decode it"
        )
    bucket, latents = _latents(version)
    pictures = np.stack([_decoded(autoencoder, latent) for latent in latents])
    buffer = io.BytesIO()
    Image.fromarray(grid_image(pictures, COLUMNS)).save(buffer, "PNG")
    write_bytes(file, buffer.getvalue())
    return f"{len(pictures)} of bucket {bucket}"


def _latents(version: StoreVersion) -> tuple[str, list[torch.Tensor]]:
    """The largest bucket and the means of some of its samples, (C, h, w) or (C, t, h, w) each."""
    buckets = version.manifest.buckets
    bucket = max(buckets, key=lambda name: buckets[name])
    table = version.table("samples", ["id", "bucket"])
    ids = table.filter(pc.field("bucket") == bucket)["id"].to_pylist()
    chosen = sorted(ids, key=sample_key)[:PICTURES]
    dataset = version.store.dataset("samples", version.manifest.tables["samples"])
    rows = dataset.to_table(
        columns=["id", "latent_mean", "latent_shape"], filter=pc.field("id").isin(chosen)
    ).to_pylist()
    rows.sort(key=lambda row: chosen.index(row["id"]))
    arrays = (decode_array(row["latent_mean"], row["latent_shape"]) for row in rows)
    return bucket, [torch.from_numpy(array.astype(np.float32)) for array in arrays]


def _decoded(autoencoder: Autoencoder, latent: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8; one at a time, as decoding takes much more memory than its result."""
    if latent.ndim == 4 and autoencoder.temporal_downsampling is None:
        latent = latent[:, 0]  # (C, h, w); of pictures: each frame by itself
    pixels = autoencoder.decode(latent[None])[0]
    return to_image(pixels[:, 0] if pixels.ndim == 4 else pixels)
