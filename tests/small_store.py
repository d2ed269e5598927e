"""A small published latent store, written without Ray or encoders."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from written_stores import laid_down

from ldm_core.latents.describe import describe
from ldm_core.latents.manifest import EncoderEntry
from ldm_core.latents.schema import (
    ARRAY_DTYPE,
    SAMPLES,
    TEXTS,
    caption_digest,
    caption_rows,
    captions_digest,
    encode_array,
    sample_digest,
)
from ldm_core.latents.store import LatentStore, StoreVersion

AUTOENCODER = EncoderEntry(name="autoencoder", uri="identity", digest="identity")
T5 = EncoderEntry(name="t5", uri="t5", digest="t")
CLIP = EncoderEntry(name="clip", uri="clip", digest="c")


def sample_row(
    id: str, mean: torch.Tensor, logvar: torch.Tensor, captions: tuple[str, ...], shard: str = "s"
) -> dict[str, object]:
    """A row of `samples`; (C, h, w) posterior, or (C, t, h, w)."""
    first, second = encode_array(mean), encode_array(logvar)
    told = caption_rows([(text, 1 / len(captions)) for text in captions])
    return {
        **{field.name: None for field in SAMPLES},
        "id": id,
        "source_id": id,
        "part": 0,
        "parts": 1,
        "media": "image",
        "bucket": f"{mean.shape[-2]}x{mean.shape[-1]}x{mean.shape[1] if mean.ndim == 4 else 1}",
        "latent_mean": first,
        "latent_logvar": second,
        "latent_shape": list(mean.shape),
        "latent_dtype": ARRAY_DTYPE,
        "captions": told,
        "captions_digest": captions_digest(told),
        "encoder_digest": AUTOENCODER.digest,
        "fingerprint": f"print of {id}",
        "digest": sample_digest(id, first, second, told, AUTOENCODER.digest),
        "shard": shard,
    }


def text_rows(caption: str, width: int = 5, pooled: int = 3) -> list[dict[str, object]]:
    """The caption's rows for t5 and clip: one token per word and one more, of recognisable value.

    Every token of a caption holds its word count; the pooled vector holds its length in letters.
    """
    words = len(caption.split())
    tokens = torch.full((words + 1, width), float(words))
    shared = {
        **{field.name: None for field in TEXTS},
        "caption_digest": caption_digest(caption),
        "caption": caption,
        "dtype": ARRAY_DTYPE,
        "shard": "texts",
    }
    return [
        {
            **shared,
            "encoder": "t5",
            "encoder_digest": T5.digest,
            "tokens": encode_array(tokens),
            "tokens_shape": list(tokens.shape),
        },
        {
            **shared,
            "encoder": "clip",
            "encoder_digest": CLIP.digest,
            "pooled": encode_array(torch.full((pooled,), float(len(caption)))),
            "pooled_size": pooled,
        },
    ]


def small_store(
    uri: str | Path,
    count: int = 12,
    shape: tuple[int, ...] = (2, 3, 3),
    logvar: float = -60.0,
    captions: tuple[tuple[str, ...], ...] = (("a dog",), ("a red cat", "cat")),
    parts: int = 3,
) -> StoreVersion:
    """Publish `count` samples of random latents; sample i has `captions[i % len(captions)]`."""
    return laid_down(uri, _write, count, shape, logvar, captions, parts, AUTOENCODER)


def _write(
    uri: str | Path,
    count: int,
    shape: tuple[int, ...],
    logvar: float,
    captions: tuple[tuple[str, ...], ...],
    parts: int,
    autoencoder: EncoderEntry,
) -> None:
    store = LatentStore(str(uri))
    store.create()
    noise = np.random.default_rng(0).normal(size=(count, *shape))
    rows = [
        sample_row(
            f"{i:03d}.png",
            torch.from_numpy(noise[i]).float(),
            torch.full(shape, logvar),
            captions[i % len(captions)],
        )
        for i in range(count)
    ]
    for k in range(parts):
        table = pa.Table.from_pylist(rows[k::parts], schema=SAMPLES)
        store.commit("samples", [store.write_part("samples", table, f"s{k}")], f"s{k}")
    texts = sorted({text for group in captions for text in group} | {""})
    table = pa.Table.from_pylist([row for text in texts for row in text_rows(text)], schema=TEXTS)
    store.commit("texts", [store.write_part("texts", table, "texts")], "texts")
    _publish(store, autoencoder)


def add_sample(store: LatentStore, id: str, caption: str) -> StoreVersion:
    """Publish a version with one more sample, of zeros."""
    shape = store.table("samples", columns=["latent_shape"])["latent_shape"][0].as_py()
    row = sample_row(id, torch.zeros(shape), torch.zeros(shape), (caption,))
    for name, rows, schema in (("samples", [row], SAMPLES), ("texts", text_rows(caption), TEXTS)):
        part = store.write_part(name, pa.Table.from_pylist(rows, schema=schema), id)
        store.commit(name, [part], id)
    return _publish(store, AUTOENCODER)


def _publish(store: LatentStore, autoencoder: EncoderEntry) -> StoreVersion:
    store.publish(describe(store, autoencoder, (T5, CLIP), 128, 1, None))
    return store.open_version()
