"""From a published version to training batches, in an order that is a function of (seed, step).

Neither the number of workers nor a restart changes what a sample looks like at a step: its place,
its posterior draw and its caption depend on (seed, epoch, sample id) alone.
Shapes: N samples, B batch, C h w latent, L tokens of width D, P pooled width, T distinct captions.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ldm_core.conditioning.text import TextCondition
from ldm_core.errors import UserError
from ldm_core.latents.codec import decode_column
from ldm_core.latents.posterior import posterior_noise
from ldm_core.latents.schema import caption_digest, decode_array
from ldm_core.latents.store import StoreVersion
from ldm_core.random import permutation, uniform

# Below this log-variance the draw is lost in the rounding of 16-bit means.
_NO_SPREAD = -30.0


@dataclass(frozen=True)
class SamplePlan:
    """Endless epochs, each a new permutation, laid end to end and cut into batches.

    Nothing is dropped: a batch may straddle two epochs. The state of a run is its step.

    Attributes:
        seed: of the run.
        count: N, number of samples.
        batch_size: of a step, over all workers.
    """

    seed: int
    count: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise UserError(
                f"a plan over {self.count} samples in batches of {self.batch_size}: both are to "
                "be at least 1"
            )

    def rows_at(self, step: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and epochs, int64 (B,), of a step; a worker's share is every world-th."""
        first = step * self.batch_size
        positions = np.arange(first + rank, first + self.batch_size, world, dtype=np.int64)
        epochs, places = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _order(self.seed, int(epoch), self.count)[places[here]]
        return rows, epochs


@dataclass(frozen=True)
class LatentBatch:
    """What a training step reads.

    Attributes:
        latents: (B, C, h, w) or (B, C, T, h, w) float32, drawn from the posterior and normalised
            per channel.
        condition: the chosen captions' embeddings, padded to the longest among them.
        ids: (B,) int64, the key of each sample's randomness.
        captions: the chosen captions.
        bucket: "HxWxT" of all of them, where the reader has several.
        epoch: of all of them, where a batch has one.
    """

    latents: Tensor
    condition: TextCondition
    ids: Tensor
    captions: list[str]
    bucket: str = ""
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> "LatentBatch":
        """The same in page-locked memory, from where a GPU fetches it while it computes."""
        condition = replace(
            self.condition,
            tokens=self.condition.tokens.pin_memory(),
            mask=self.condition.mask.pin_memory(),
            pooled=self.condition.pooled.pin_memory(),
        )
        return replace(self, latents=self.latents.pin_memory(), condition=condition)


class LatentReader:
    """A version's latents and embeddings, held in memory as 16-bit floats.

    For one bucket, and for what fits: 4 x N x C x h x w bytes of latents, 2 x D bytes for each
    token of each distinct caption. Row numbers follow the sorted sample ids.

    Attributes:
        ids: the sample ids, sorted.
        keys: (N,) int64, a hash of each id.
        mean, std: (C, 1, 1), of clips (C, 1, 1, 1), of the raw latents.
    """

    def __init__(self, version: StoreVersion) -> None:
        self.version = version
        manifest = version.manifest
        if len(manifest.buckets) != 1:
            raise UserError(
                f"{version.store.uri} version {version.number} holds the buckets "
                f"{manifest.buckets}, this reader takes one: encode pictures alone, with "
                "encode.max_aspect=1 and encode.upscale=true"
            )
        table = version.table("samples", ["id", "latent_shape", "captions"]).sort_by("id")
        self.ids: list[str] = table["id"].to_pylist()
        self.keys = torch.tensor([sample_key(id) for id in self.ids])
        self.shape: tuple[int, ...] = tuple(table["latent_shape"][0].as_py())
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32).view(-1, *[1] * (len(self.shape) - 1))
            for values in (manifest.statistics.mean, manifest.statistics.std)
        )
        self._latents, self._logvars = _load_latents(version, self.ids, self.shape)
        self._spread = bool((self._logvars > _NO_SPREAD).any())
        self._texts = _Texts(version)
        self._choices = _Choices(table["captions"].to_pylist(), self._texts)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def token_width(self) -> int:
        """D, width of the token embeddings."""
        return self._texts.tokens.shape[1]

    @property
    def pooled_width(self) -> int:
        """P, width of the pooled embeddings."""
        return self._texts.pooled.shape[1]

    def batch(self, rows: np.ndarray, epochs: np.ndarray, seed: int) -> LatentBatch:
        """The samples of a step, as `SamplePlan.rows_at` gives rows and epochs, (B,) each."""
        index = torch.from_numpy(rows)
        ids = self.keys[index]
        latents = self._latents[index].float()
        if self._spread:
            eps = posterior_noise(seed, torch.from_numpy(epochs), ids, self.shape)
            latents.addcmul_(eps, torch.exp(0.5 * self._logvars[index].float()))
        u = _per_epoch(uniform, seed, "caption", epochs, ids, ())
        texts = self._choices.pick(index, u)
        return LatentBatch(
            latents=(latents - self.mean) / self.std,
            condition=self._texts.condition(texts),
            ids=ids,
            captions=[self._texts.captions[text] for text in texts.tolist()],
        )

    def null_condition(self) -> TextCondition:
        """The stored embedding of the empty caption, a batch of one."""
        return self._texts.condition(torch.tensor([self._texts.find(caption_digest(""))]))


class _Texts:
    """Embeddings of the distinct captions, tokens end to end: no padding is held."""

    def __init__(self, version: StoreVersion) -> None:
        by_encoder = {entry.name: entry.digest for entry in version.manifest.texts}
        table = version.table("texts").sort_by("caption_digest")
        t5, clip = (
            table.filter(
                (pa.compute.field("encoder") == name)
                & (pa.compute.field("encoder_digest") == by_encoder[name])
            )
            for name in ("t5", "clip")
        )
        assert t5["caption_digest"].equals(clip["caption_digest"]), "texts lack an encoder"
        self.captions: list[str] = t5["caption"].to_pylist()
        self._index = {digest: i for i, digest in enumerate(t5["caption_digest"].to_pylist())}
        shapes = np.array(t5["tokens_shape"].to_pylist(), dtype=np.int64)  # (T, 2)
        lengths, width = shapes[:, 0].copy(), int(shapes[0, 1])
        self._lengths = torch.from_numpy(lengths)
        self._starts = torch.cumsum(self._lengths, 0) - self._lengths
        self.tokens = decode_column(t5["tokens"], t5["dtype"], lengths, width)  # (sum of L, D)
        width, once = int(clip["pooled_size"][0].as_py()), np.ones_like(lengths)
        self.pooled = decode_column(clip["pooled"], clip["dtype"], once, width)  # (T, P)

    def find(self, digest: str) -> int:
        """Position of a caption among the texts."""
        return self._index[digest]

    def condition(self, texts: Tensor) -> TextCondition:
        """Embeddings of texts (B,), padded with zeros to the longest of them."""
        lengths = self._lengths[texts]
        place = torch.arange(int(lengths.max()))[None]  # (1, L)
        mask = place < lengths[:, None]
        rows = torch.where(mask, self._starts[texts][:, None] + place, 0)
        tokens = self.tokens[rows].float() * mask[..., None]
        return TextCondition(tokens, mask, self.pooled[texts].float())


class _Choices:
    """Each sample's captions and their weights, ready for a draw."""

    def __init__(self, captions: list[list[dict[str, Any]]], texts: _Texts) -> None:
        width = max(len(row) for row in captions)
        self._texts = torch.zeros(len(captions), width, dtype=torch.int64)
        weights = torch.zeros(len(captions), width, dtype=torch.float64)
        for i, row in enumerate(captions):
            for j, entry in enumerate(row):
                self._texts[i, j] = texts.find(entry["digest"])
                weights[i, j] = entry["weight"]
        upto = torch.cumsum(weights, 1)
        self._upto = upto / upto[:, -1:]  # exactly 1 from a row's last caption on

    def pick(self, rows: Tensor, u: Tensor) -> Tensor:
        """The text (B,) of each row: the first whose cumulated weight exceeds u (B,) in (0, 1)."""
        chosen = (self._upto[rows] <= u[:, None]).sum(1, keepdim=True)
        return self._texts[rows].gather(1, chosen)[:, 0]


def sample_key(id: str) -> int:
    """A hash of a sample's id in [0, 2^63): what its randomness is drawn from."""
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "little") >> 1


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return permutation(seed, epoch, count)


def _per_epoch(
    draw: Callable[..., Tensor],
    seed: int,
    stream: str,
    epochs: np.ndarray,
    ids: Tensor,
    shape: tuple[int, ...],
) -> Tensor:
    """(B, *shape): `draw` for each id at its own epoch."""
    result = torch.empty(len(ids), *shape)
    for epoch in np.unique(epochs):
        here = torch.from_numpy(epochs == epoch)
        result[here] = draw(seed, stream, int(epoch), ids[here], shape)
    return result


def _stack(column: pa.ChunkedArray, shape: tuple[int, ...]) -> Tensor:
    """Binary cells of float16 end to end, (-1, *shape)."""
    parts = [decode_array(b"".join(chunk.to_pylist()), (-1, *shape)) for chunk in column.chunks]
    return torch.from_numpy(np.concatenate(parts))


def _load_latents(
    version: StoreVersion, ids: list[str], shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Means and log-variances, (N, C, h, w) float16 each, in the order of `ids`."""
    place = {id: i for i, id in enumerate(ids)}
    mean, logvar = (torch.empty(len(ids), *shape, dtype=torch.float16) for _ in range(2))
    for batch in version.batches("samples", ["id", "latent_mean", "latent_logvar"]):
        rows = torch.tensor([place[id] for id in batch["id"].to_pylist()], dtype=torch.int64)
        for name, target in (("latent_mean", mean), ("latent_logvar", logvar)):
            if len(rows):
                target[rows] = _stack(pa.chunked_array([batch[name]]), shape)
    return mean, logvar
