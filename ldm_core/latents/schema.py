"""What the latent store's tables hold: Arrow schemas, the 16-bit codec and the digests.

Delta Lake has neither float16 nor unsigned integers (it commits the latter as signed and then
cannot read them back), so arrays are bytes with a shape and a dtype beside them, and every integer
is signed. Latents are (C, h, w), token embeddings (L, D) at their true length, pooled ones (P,).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

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
        ("source_uri", pa.string()),
        ("source_sha256", pa.string()),
        ("source_bytes", pa.int64()),
        ("media", pa.string()),  # "image"
        ("width", pa.int32()),  # of the source, upright, pixels
        ("height", pa.int32()),
        ("frames", pa.int32()),
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
        ("encoder_digest", pa.string()),
        ("fingerprint", pa.string()),  # of everything that decides the row: see ledger.py
        ("digest", pa.string()),  # of what training reads of it: see sample_digest
        ("shard", pa.string()),
    ]
)

TEXTS = pa.schema(
    [
        ("caption_digest", pa.string()),
        ("caption", pa.string()),
        ("encoder", pa.string()),  # "t5" or "clip"
        ("tokens", pa.binary()),  # null where the encoder gives none
        ("tokens_shape", pa.list_(pa.int32())),
        ("pooled", pa.binary()),  # null where the encoder gives none
        ("pooled_size", pa.int32()),
        ("dtype", pa.string()),
        ("encoder_digest", pa.string()),
        ("shard", pa.string()),
    ]
)

REJECTS = pa.schema(
    [
        ("id", pa.string()),
        ("source_uri", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("fingerprint", pa.string()),
        ("shard", pa.string()),
    ]
)

TABLES = {"samples": SAMPLES, "texts": TEXTS, "rejects": REJECTS}


def bucket_name(height: int, width: int, frames: int = 1) -> str:
    """The bucket of media of one size, e.g. "64x64x1"."""
    return f"{height}x{width}x{frames}"


def caption_digest(text: str) -> str:
    """The key of a caption in `texts`: 32 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def caption_rows(captions: Sequence[str]) -> list[dict[str, object]]:
    """The `captions` column of one sample: equal weights that sum to one."""
    return [
        {"caption": text, "weight": 1 / len(captions), "digest": caption_digest(text)}
        for text in captions
    ]


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


def sample_digest(
    id: str, mean: bytes, logvar: bytes, captions: Iterable[str], encoder_digest: str
) -> str:
    """32 hex digits over what training reads of a sample: not where it came from, nor its shard."""
    digest = hashlib.sha256(json.dumps([id, encoder_digest, list(captions)]).encode())
    digest.update(b"\0" + mean + b"\0" + logvar)
    return digest.hexdigest()[:32]


def content_digest(samples: Iterable[str], encoder_digests: Iterable[str]) -> str:
    """16 hex digits over a set of sample digests, in whatever order they come, and the encoders."""
    total = sum(int(digest, 16) for digest in samples) % 2**128
    text = json.dumps([f"{total:032x}", *encoder_digests])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
