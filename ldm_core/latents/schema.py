"""What the latent store's tables hold: Arrow schemas, the 16-bit codec and the digests.

Delta Lake has neither float16 nor unsigned integers (it commits the latter as signed and then
cannot read them back), so arrays are bytes with a shape and a dtype beside them, and every integer
is signed. Latents are (C, h, w), token embeddings (L, D) at their true length, pooled ones (P,).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ldm_core.errors import BadMedia

ARRAY_DTYPE = "float16"

CAPTION = pa.struct([("caption", pa.string()), ("weight", pa.float32()), ("digest", pa.string())])

SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("source_id", pa.string()),  # of the file; a video's clips have ids of their own
        ("part", pa.int32()),  # which of the file's rows, of how many
        ("parts", pa.int32()),
        ("source_uri", pa.string()),
        ("source_sha256", pa.string()),
        ("source_bytes", pa.int64()),
        ("perceptual_hash", pa.int64()),  # dHash of the picture, or of a clip's first frame
        ("media", pa.string()),  # "image" or "video"
        ("width", pa.int32()),  # of the source, upright, pixels
        ("height", pa.int32()),
        ("frames", pa.int32()),  # of the clip; 1 of a picture
        ("fps", pa.float32()),  # of the clip; null of a picture
        ("start_s", pa.float64()),  # of the clip in its video, seconds; null of a picture
        ("crop_left", pa.int32()),  # of the source, pixels; right and bottom are exclusive
        ("crop_top", pa.int32()),
        ("crop_right", pa.int32()),
        ("crop_bottom", pa.int32()),
        ("bucket", pa.string()),  # "HxWxT" of what was encoded, pixels and frames
        ("latent_mean", pa.binary()),
        ("latent_logvar", pa.binary()),
        ("latent_shape", pa.list_(pa.int32())),
        ("latent_dtype", pa.string()),
        ("captions", pa.list_(CAPTION)),
        ("captions_digest", pa.string()),
        ("encoder_digest", pa.string()),
        ("fingerprint", pa.string()),  # of what decides the row but its captions: see ledger.py
        ("digest", pa.string()),  # of what training reads of it: see sample_digest
        ("shard", pa.string()),
    ]
)

TEXTS = pa.schema(
    [
        ("caption_digest", pa.string()),
        ("caption", pa.string()),
        ("encoder", pa.string()),  # "t5", whichever gives training its tokens, or "clip"
        ("tokens", pa.binary()),  # null where the encoder gives none
        ("tokens_shape", pa.list_(pa.int32())),
        ("pooled", pa.binary()),  # null where the encoder gives none
        ("pooled_size", pa.int32()),
        ("dtype", pa.string()),
        ("encoder_digest", pa.string()),
        ("shard", pa.string()),
        (
            "relative_error",
            pa.float32(),
        ),  # of 8-bit storage: ||x - x^|| / ||x||
    ]
)

REJECTS = pa.schema(
    [
        ("id", pa.string()),
        ("source_id", pa.string()),
        ("part", pa.int32()),
        ("parts", pa.int32()),
        ("source_uri", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("fingerprint", pa.string()),
        ("shard", pa.string()),
    ]
)

TABLES = {"samples": SAMPLES, "texts": TEXTS, "rejects": REJECTS}
LATER = frozenset(("relative_error",))  # columns that files of earlier programs lack: nulls


def caption_digest(text: str) -> str:
    """The key of a caption in `texts`: 32 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def caption_rows(captions: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The `captions` column of one sample, from texts and the weights that sum to one.

    Weights are rounded as the column does: digests are of what can be read from it.
    """
    return [
        {"caption": text, "weight": float(np.float32(weight)), "digest": caption_digest(text)}
        for text, weight in captions
    ]


def captions_digest(captions: Iterable[Mapping[str, Any]]) -> str:
    """16 hex digits over a `captions` column, weights to six places: they are stored in 32 bits."""
    told = [(row["caption"], f"{row['weight']:.6f}") for row in captions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def encode_array(values: Tensor) -> bytes:
    """An array as little-endian 16-bit floats, row-major.

    Raises:
        BadMedia: stage "encode", reason "non-finite latent": NaN, infinity, or beyond 65504,
            where 16 bits end.
    """
    half = values.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(half).all()):
        largest = float(values.detach().abs().max())
        raise BadMedia("encode", "non-finite latent", f"largest magnitude {largest:g}")
    return half.contiguous().numpy().astype("<f2", copy=False).tobytes()


def decode_array(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """What `encode_array` made, as a read-only float16 array of `shape`."""
    return np.frombuffer(data, "<f2").reshape(tuple(shape))


def latent_digest(id: str, mean: bytes, logvar: bytes, encoder_digest: str) -> str:
    """16 hex digits over a sample's latents and what made them."""
    digest = hashlib.sha256(json.dumps([id, encoder_digest]).encode())
    digest.update(b"\0" + mean + b"\0" + logvar)
    return digest.hexdigest()[:16]


def sample_digest(
    id: str,
    mean: bytes,
    logvar: bytes,
    captions: Iterable[Mapping[str, Any]],
    encoder_digest: str,
) -> str:
    """32 hex digits over what training reads of a sample: not where it came from, nor its shard.

    The first half is of the latents, the second of the captions, so that new captions make a new
    digest without the latents being read.
    """
    return latent_digest(id, mean, logvar, encoder_digest) + captions_digest(captions)


def content_digest(samples: Iterable[str], encoder_digests: Iterable[str]) -> str:
    """16 hex digits over a set of sample digests, in whatever order they come, and the encoders."""
    total = sum(int(digest, 16) for digest in samples) % 2**128
    text = json.dumps([f"{total:032x}", *encoder_digests])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
