"""What the encode job's actors do with captions: text encoders' embeddings -> Parquet files."""

import json

import torch

from ldm_core.errors import BadMedia, UserError
from ldm_core.latents.codec import measured_embedding
from ldm_core.latents.schema import ARRAY_DTYPE, caption_digest
from ldm_core.latents.store import LatentStore
from ldm_core.latents.stored import stored_as
from ldm_core.text.encoders import TextEmbedding, TextEncoder, load_clip
from ldm_core.text.token_encoders import load_tokens
from pipelines.encode_media import Row
from pipelines.encode_plan import Job
from pipelines.encode_results import written
from pipelines.encode_throughput import TEXT, Throughput


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
