"""What the encode job runs on Ray workers: callables on one row, which is one shard.

A shard stays one row from listing to Parquet file, so Ray Data can neither split it nor merge it
with its neighbour, and a result says "this shard is written". Decoding is a stage of its own, of
CPU tasks, because a GPU's actor should never wait for a JPEG: Ray spreads it over whatever CPUs
the cluster has and holds it back when the actors fall behind. What travels between the two is
shard_size x size x size x 3 bytes of 8-bit pixels (13 MB for 1024 pictures of 64; choose smaller
shards for larger pictures). Without GPUs there is nobody to keep waiting, and Ray Data fuses the
two: each actor decodes what it encodes.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ldm_core.autoencoders.autoencoder import Posterior, load_autoencoder
from ldm_core.errors import BadMedia, UserError
from ldm_core.latents.schema import (
    ARRAY_DTYPE,
    TABLES,
    bucket_name,
    caption_digest,
    caption_rows,
    encode_array,
    sample_digest,
)
from ldm_core.latents.store import LatentStore, PartFile
from ldm_core.media.decode import decode_image, fit_to_square, to_pixels
from ldm_core.media.folder import read_bytes
from ldm_core.text.encoders import TextEncoder, load_clip, load_t5
from pipelines.encode_plan import Item, Job

READS_IN_FLIGHT = 16  # files held while one is decoded; a bucket answers each in tens of ms

Row = dict[str, Any]


def decode_shard(row: Row, size: int) -> Row:
    """Read and decode a shard's pictures; one that cannot be used goes on without pixels.

    Args:
        row: "shard", and "items" as JSON: id, uri, captions, fingerprint of each picture.
        size: side of the squares, pixels.

    Returns:
        The row with "items" completed (size and crop, or stage, reason, detail) and "pixels":
        (n, size, size, 3) uint8 of the n usable ones, in order.
    """
    items: list[Item] = json.loads(row["items"])
    pixels = bytearray()
    with ThreadPoolExecutor(READS_IN_FLIGHT) as readers:
        for start in range(0, len(items), READS_IN_FLIGHT):
            group = items[start : start + READS_IN_FLIGHT]
            for item, data in zip(group, readers.map(_read, group), strict=True):
                pixels += _decode(item, data, size)
    return {"shard": row["shard"], "items": json.dumps(items), "pixels": bytes(pixels)}


def _read(item: Item) -> bytes:
    """The file's bytes. What the driver has listed and a worker cannot read is no bad picture."""
    try:
        return read_bytes(item["uri"])
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(
            f"{item['uri']} was listed but a worker cannot read it ({type(error).__name__}): every "
            "node needs the same disk or bucket and the right to read it; then run the same "
            "command again, it goes on from what is finished"
        ) from error


def _decode(item: Item, data: bytes, size: int) -> bytes:
    """Complete the item and return its pixels; none, with the reason noted, if it is bad."""
    try:
        image = decode_image(data)
    except BadMedia as error:
        item.update(_reject(error))
        return b""
    square, crop = fit_to_square(image, size)
    item.update(height=image.shape[0], width=image.shape[1], crop=crop)
    item.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    return square.tobytes()


def _reject(error: BadMedia) -> Item:
    return {"stage": error.stage, "reason": error.reason, "detail": error.detail}


class EncodeImages:
    """Decoded shard -> Parquet files of samples and rejects, not yet committed."""

    def __init__(self, job: Job, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.job, self.store, self.device = job, LatentStore(job.store), device
        self.autoencoder = load_autoencoder(job.autoencoder, self.device)

    def __call__(self, row: Row) -> Row:
        """Encode one shard; the result row lists the files written."""
        items: list[Item] = json.loads(row["items"])
        good = [item for item in items if "reason" not in item]
        side = self.job.size
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(len(good), side, side, 3)
        for start in range(0, len(good), self.job.batch_size):
            stop = start + self.job.batch_size
            self._encode(good[start:stop], pixels[start:stop])
        return self._write(row["shard"], items)

    def _encode(self, items: Sequence[Item], pixels: np.ndarray) -> None:
        """Add each item's posterior; a non-finite one makes the item a reject."""
        batch = torch.stack([to_pixels(picture) for picture in pixels])
        posterior: Posterior = self.autoencoder.encode(batch.to(self.device))
        means, logvars = posterior.mean.cpu(), posterior.logvar.cpu()  # once, not sample by sample
        for item, mean, logvar in zip(items, means, logvars, strict=True):
            try:
                item["latent"] = (encode_array(mean), encode_array(logvar), list(mean.shape))
            except BadMedia as error:
                item.update(_reject(error))

    def _write(self, shard: str, items: Sequence[Item]) -> Row:
        samples = [self._sample(item) for item in items if "reason" not in item]
        rejects = [reject_row(item) for item in items if "reason" in item]
        parts = write_parts(self.store, shard, samples=samples, rejects=rejects)
        return result_row(shard, parts)

    def _sample(self, item: Item) -> Row:
        mean, logvar, shape = item["latent"]
        left, top, right, bottom = item["crop"]
        digest = self.autoencoder.digest
        return {
            "id": item["id"],
            "source_uri": item["uri"],
            "source_sha256": item["sha256"],
            "source_bytes": item["bytes"],
            "media": "image",
            "width": item["width"],
            "height": item["height"],
            "frames": 1,
            "crop_left": left,
            "crop_top": top,
            "crop_right": right,
            "crop_bottom": bottom,
            "bucket": bucket_name(self.job.size, self.job.size),
            "latent_mean": mean,
            "latent_logvar": logvar,
            "latent_shape": shape,
            "latent_dtype": ARRAY_DTYPE,
            "captions": caption_rows(item["captions"]),
            "encoder_digest": digest,
            "fingerprint": item["fingerprint"],
            "digest": sample_digest(item["id"], mean, logvar, item["captions"], digest),
        }


class EncodeTexts:
    """Shard of captions -> Parquet file of embeddings, not yet committed.

    One actor serves both encoders and loads each when its first shard comes.
    """

    def __init__(self, job: Job, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.job, self.store, self.device = job, LatentStore(job.store), device
        self.encoders: dict[str, TextEncoder] = {}

    def __call__(self, row: Row) -> Row:
        """Embed one shard; the result row lists the file written."""
        encoder = self._encoder(row["encoder"])
        captions: list[str] = json.loads(row["items"])
        rows: list[Row] = []
        for start in range(0, len(captions), self.job.batch_size):
            batch = captions[start : start + self.job.batch_size]
            for caption, embedding in zip(batch, encoder.encode(batch), strict=True):
                rows.append(_text_row(encoder, caption, embedding.tokens, embedding.pooled))
        return result_row(row["shard"], write_parts(self.store, row["shard"], texts=rows))

    def _encoder(self, name: str) -> TextEncoder:
        if name not in self.encoders:
            load, uri = (load_t5, self.job.t5) if name == "t5" else (load_clip, self.job.clip)
            self.encoders[name] = load(uri, self.job.max_tokens, self.device)
        return self.encoders[name]


def _text_row(
    encoder: TextEncoder, caption: str, tokens: torch.Tensor | None, pooled: torch.Tensor | None
) -> Row:
    try:
        return {
            "caption_digest": caption_digest(caption),
            "caption": caption,
            "encoder": encoder.name,
            "tokens": None if tokens is None else encode_array(tokens),
            "tokens_shape": None if tokens is None else list(tokens.shape),
            "pooled": None if pooled is None else encode_array(pooled),
            "pooled_size": None if pooled is None else pooled.numel(),
            "dtype": ARRAY_DTYPE,
            "encoder_digest": encoder.digest,
        }
    except BadMedia as error:
        raise UserError(
            f"{encoder.name} embeds the caption {caption!r} beyond 16 bits ({error.detail}): "
            "use another text encoder"
        ) from error


def reject_row(item: Item) -> Row:
    """A row of `rejects` from an item with stage, reason and detail."""
    names = ("id", "stage", "reason", "detail", "fingerprint")
    return {"source_uri": item["uri"], **{name: item[name] for name in names}}


def write_parts(store: LatentStore, shard: str, **tables: list[Row]) -> list[PartFile]:
    """A file for every table that has rows of this shard."""
    return [
        store.write_part(
            name,
            pa.Table.from_pylist([{**row, "shard": shard} for row in rows], schema=TABLES[name]),
            shard,
        )
        for name, rows in tables.items()
        if rows
    ]


def result_row(shard: str, parts: Sequence[PartFile]) -> Row:
    """What goes back to the driver: small, whatever the shard's size."""
    return {"shard": shard, "parts": json.dumps([asdict(part) for part in parts])}


def parts_of(result: Row) -> list[PartFile]:
    """The files a result row lists."""
    return [PartFile(**part) for part in json.loads(result["parts"])]
