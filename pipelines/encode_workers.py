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

import numpy as np
import torch

from ldm_core.autoencoders.autoencoder import Autoencoder, Posterior, load_autoencoder
from ldm_core.autoencoders.tiling import TiledAutoencoder
from ldm_core.errors import BadMedia, UserError
from ldm_core.latents.schema import (
    ARRAY_DTYPE,
    caption_rows,
    captions_digest,
    encode_array,
    sample_digest,
)
from ldm_core.latents.store import LatentStore
from ldm_core.media.buckets import Bucket
from ldm_core.media.pixels import to_pixels
from pipelines.encode_captions import EncodeTexts
from pipelines.encode_media import Row, reject_of
from pipelines.encode_plan import Item, Job
from pipelines.encode_results import reject_row, written
from pipelines.encode_throughput import ENCODE, Throughput

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
