"""What the encode job's actors do: decoded shards and captions -> Parquet files.

A shard stays one row from listing to Parquet file, so Ray Data can neither split it nor merge it
with its neighbour, and a result says "this shard is written". All of it has one bucket, so that
batches are full. Decoding (`encode_media.py`) is a stage of its own, of CPU tasks, because a GPU's
actor should never wait for a JPEG: Ray spreads it over whatever CPUs the cluster has and holds it
back when the actors fall behind. What travels between the two is at most encode.shard_mib of 8-bit
pixels. Without GPUs there is nobody to keep waiting, and Ray Data fuses the two: each actor decodes
what it encodes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch

from ldm_core.autoencoders.autoencoder import Autoencoder, Posterior, load_autoencoder
from ldm_core.autoencoders.tiling import TiledAutoencoder
from ldm_core.errors import BadMedia, UserError
from ldm_core.latents.codec import measured_embedding
from ldm_core.latents.schema import (
    ARRAY_DTYPE,
    TABLES,
    caption_digest,
    caption_rows,
    captions_digest,
    encode_array,
    sample_digest,
)
from ldm_core.latents.store import LatentStore, PartFile
from ldm_core.latents.stored import stored_as
from ldm_core.media.buckets import Bucket
from ldm_core.media.pixels import to_pixels
from ldm_core.text.encoders import TextEmbedding, TextEncoder, load_clip
from ldm_core.text.token_encoders import load_tokens
from pipelines.encode_media import Row, reject_of
from pipelines.encode_plan import Item, Job
from pipelines.encode_throughput import ENCODE, TEXT, WRITE, Throughput

CPU_PIXELS = 2**17  # 32 pictures of 64 x 64, 2 of 256 x 256; larger batches are slower there
# 128 pictures of 256 x 256, 8 of 1024 x 1024, of which an autoencoder of Stable Diffusion's kind
# takes some GB each in float32; where that is too much, batches are halved.
GPU_PIXELS = 2**23


class EncodeShard:
    """A shard of either kind -> Parquet files, not yet committed.

    One actor does both, so that no other has to start for the captions, and nobody waits for the
    last picture. The encoders of one kind are held at a time: a GPU may lack room for both.
    """

    def __init__(self, job: Job, threads: int, device: str) -> None:
        self._arguments = (job, threads, device)
        self._worker: EncodeMedia | EncodeTexts | None = None

    def __call__(self, row: Row) -> Row:
        """Encode one shard; the result row lists the files written."""
        kind = EncodeTexts if row["encoder"] else EncodeMedia
        if not isinstance(self._worker, kind):
            self._worker = None  # first: there may be no room for a moment either
            self._worker = kind(*self._arguments)
        return self._worker(row)


class EncodeMedia:
    """Decoded shard -> Parquet files of samples and rejects, not yet committed."""

    def __init__(self, job: Job, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.job, self.store, self.device = job, LatentStore(job.store), device
        self.autoencoder = _loaded(job, device)
        self.most_pixels = CPU_PIXELS if device == "cpu" else GPU_PIXELS

    def __call__(self, row: Row) -> Row:
        """Encode one shard; the result row lists the files written."""
        throughput = Throughput()
        throughput.add(row["work"])
        samples, rejects = self.rows(row, throughput)
        return written(self.store, row["shard"], throughput, samples=samples, rejects=rejects)

    def rows(self, row: Row, throughput: Throughput | None = None) -> tuple[list[Row], list[Row]]:
        """The rows of samples and of rejects that a decoded shard makes; what could be decoded is
        counted."""
        items: list[Item] = json.loads(row["items"])
        good = [item for item in items if "reason" not in item]
        with (throughput or Throughput()).timed(ENCODE, len(good)):
            self._encode_all(good, row)
        samples = [self._sample(item, row["bucket"]) for item in items if "reason" not in item]
        return samples, [reject_row(item) for item in items if "reason" in item]

    def _encode_all(self, good: list[Item], row: Row) -> None:
        bucket = Bucket.parse(row["bucket"])
        size = (bucket.frames, bucket.height, bucket.width, 3)
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(len(good), *size)
        start = 0
        while start < len(good):
            stop = start + self.at_once(bucket)
            if self._has_room(good[start:stop], pixels[start:stop], bucket):
                start = stop

    def _has_room(self, items: list[Item], pixels: np.ndarray, bucket: Bucket) -> bool:
        """Encode them, or have batches of half as many frames from now on.

        Raises:
            UserError: there is no room for a single frame.
        """
        try:
            self._encode(items, pixels)
            return True
        except torch.OutOfMemoryError as error:
            frames = self._frames_at_once(bucket.height, bucket.width)
            if frames == 1:
                raise UserError(
                    f"{self.device} has no room to encode a sample of {bucket.name} (height x "
                    "width x frames): set or lower encode.tile, set encode.precision=bf16 or lower "
                    "encode.frames"
                ) from error
        self.most_pixels = frames // 2 * bucket.height * bucket.width
        torch.cuda.empty_cache()  # here: the error holds what was allocated until it is gone
        return False

    def at_once(self, bucket: Bucket) -> int:
        """Parts of a batch: as many as the job says, but no more than its device has room for, a
        CPU in its caches; one of those that are cut into tiles."""
        return max(1, self._frames_at_once(bucket.height, bucket.width) // bucket.frames)

    def _frames_at_once(self, height: int, width: int) -> int:
        if self.job.tile and max(height, width) > self.job.tile:
            return 1
        return max(1, min(self.job.batch_size, self.most_pixels // (height * width)))

    def _encode(self, items: Sequence[Item], pixels: np.ndarray) -> None:
        """Add each item's posterior; a non-finite one makes the item a reject."""
        frames = to_pixels(pixels).to(self.device)  # (B, T, 3, H, W)
        posterior = self._posterior(frames)
        means, logvars = posterior.mean.cpu(), posterior.logvar.cpu()  # once, not one by one
        for item, mean, logvar in zip(items, means, logvars, strict=True):
            try:
                item["latent"] = (encode_array(mean), encode_array(logvar), list(mean.shape))
            except BadMedia as error:
                item.update(reject_of(error))

    def _posterior(self, frames: torch.Tensor) -> Posterior:
        """Of single frames (B, C, h, w), whether of pictures or of clips, for they share a bucket;
        of more (B, C, t, h, w)."""
        if frames.shape[1] == 1:
            return self.autoencoder.encode(frames[:, 0])
        if self.autoencoder.temporal_downsampling is not None:
            return self.autoencoder.encode(frames.transpose(1, 2))
        # Every frame is a picture: a clip of many is more than one batch of them.
        pictures = frames.flatten(0, 1).split(self._frames_at_once(*frames.shape[-2:]))
        each = [self.autoencoder.encode(some) for some in pictures]
        mean, logvar = (
            torch.cat(parts).unflatten(0, frames.shape[:2]).transpose(1, 2)
            for parts in ([one.mean for one in each], [one.logvar for one in each])
        )
        return Posterior(mean, logvar)

    def _sample(self, item: Item, bucket: str) -> Row:
        mean, logvar, shape = item["latent"]
        left, top, right, bottom = item["crop"]
        start_s, frames, fps = item.get("clip") or (None, 1, None)
        captions, digest = caption_rows(item["captions"]), self.autoencoder.digest
        return {
            "id": item["id"],
            "source_id": item["source"],
            "part": item["part"],
            "parts": item["parts"],
            "source_uri": item["uri"],
            "source_sha256": item["sha256"],
            "source_bytes": item["bytes"],
            "perceptual_hash": item["hash"],
            "media": item["kind"],
            "width": item["width"],
            "height": item["height"],
            "frames": frames,
            "fps": fps,
            "start_s": start_s,
            "crop_left": left,
            "crop_top": top,
            "crop_right": right,
            "crop_bottom": bottom,
            "bucket": bucket,
            "latent_mean": mean,
            "latent_logvar": logvar,
            "latent_shape": shape,
            "latent_dtype": ARRAY_DTYPE,
            "captions": captions,
            "captions_digest": captions_digest(captions),
            "encoder_digest": digest,
            "fingerprint": item["fingerprint"],
            "digest": sample_digest(item["id"], mean, logvar, captions, digest),
        }


def _loaded(job: Job, device: str) -> Autoencoder:
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    whole = load_autoencoder(job.autoencoder, device, job.channels_last, dtype)
    return TiledAutoencoder(whole, job.tile) if job.tile else whole


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
        captions, throughput = json.loads(row["items"]), Throughput()
        self._encoder(row["encoder"])  # loads it, which is no embedding
        with throughput.timed(TEXT, len(captions)):
            texts = self.rows(row["encoder"], captions)
        return written(self.store, row["shard"], throughput, texts=texts)

    def rows(self, name: str, captions: list[str]) -> list[Row]:
        """The rows of `texts` that an encoder makes of captions."""
        encoder, rows = self._encoder(name), list[Row]()
        for start in range(0, len(captions), self.job.batch_size):
            batch = captions[start : start + self.job.batch_size]
            for caption, embedding in zip(batch, encoder.encode(batch), strict=True):
                rows.append(self._row(encoder, caption, embedding))
        return rows

    def _encoder(self, name: str) -> TextEncoder:
        if name not in self.encoders:
            self.encoders[name] = self._load(name)
        return self.encoders[name]

    def _load(self, name: str) -> TextEncoder:
        job = self.job
        if name == "t5":
            return load_tokens(job.t5, job.max_tokens, self.device)
        return load_clip(job.clip, job.max_tokens, self.device, job.clip_tokens)

    def _row(self, encoder: TextEncoder, caption: str, embedding: TextEmbedding) -> Row:
        """A row of `texts`: tokens as the job says, and a pooled vector beside them as well; alone
        it is in 16 bits. Of the errors of both the larger is told."""
        tokens, pooled = embedding.tokens, embedding.pooled
        both = tokens is not None and pooled is not None
        dtype = ARRAY_DTYPE if tokens is None else self.job.text_dtype
        rows = (tokens, None if pooled is None else pooled[None])
        try:
            each = [(None, None) if x is None else measured_embedding(x, dtype) for x in rows]
            errors = [error for _, error in each if error is not None]
            return {
                "caption_digest": caption_digest(caption),
                "caption": caption,
                "encoder": encoder.name,
                "tokens": each[0][0],
                "tokens_shape": None if tokens is None else list(tokens.shape),
                "pooled": each[1][0],
                "pooled_size": None if pooled is None else pooled.numel(),
                "dtype": dtype,
                "encoder_digest": stored_as(encoder.digest, dtype, both),
                "relative_error": max(errors, default=None),
            }
        except BadMedia as bad:
            raise UserError(
                f"{encoder.name} embeds the caption {caption!r} beyond 16 bits ({bad.detail}): "
                "use another text encoder"
            ) from bad


def reject_row(item: Item) -> Row:
    """A row of `rejects` from an item with stage, reason and detail."""
    names = ("id", "part", "parts", "stage", "reason", "detail", "fingerprint")
    about = {"source_id": item["source"], "source_uri": item["uri"]}
    return {**about, **{name: item[name] for name in names}}


def written(
    store: LatentStore,
    shard: str,
    throughput: Throughput,
    kind: str = WRITE,
    **tables: list[Row],
) -> Row:
    """Write a file for every table that has rows of this shard; the result for the driver, which is
    small, whatever the shard's size. What the driver itself writes is of another kind."""
    parts = []
    for name, rows in tables.items():
        if rows:
            table = table_of(name, rows, shard)
            with throughput.timed(kind, len(rows), table.nbytes):
                parts.append(store.write_part(name, table, shard))
    told = json.dumps([asdict(part) for part in parts])
    return {"shard": shard, "parts": told, "work": throughput.tell()}


def table_of(name: str, rows: list[Row], shard: str) -> pa.Table:
    """Rows as a table of the store."""
    return pa.Table.from_pylist([{**row, "shard": shard} for row in rows], schema=TABLES[name])


def parts_of(result: Row) -> list[PartFile]:
    """The files a result row lists."""
    return [PartFile(**part) for part in json.loads(result["parts"])]
