"""The rules that the rows of `texts` obey, asked of one row after the other."""

from collections.abc import Mapping, Sequence

import numpy as np

from ldm_core.latents.codec import decode_embedding
from ldm_core.latents.manifest import Manifest
from ldm_core.latents.rounding import RoundingErrors
from ldm_core.latents.schema import caption_digest
from ldm_core.latents.tally import Check, Row, Tally, differs, not_finite


class TextChecks:
    """The rules of `texts`.

    Attributes:
        known: digests of the captions that each of the manifest's encoders embedded.
        count: rows seen.
        rounding: what they say of their 8 bits.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.count, self.rounding = 0, RoundingErrors()
        self.known: dict[str, set[str]] = {entry.name: set() for entry in manifest.texts}
        self._encoders = {entry.name: entry.digest for entry in manifest.texts}
        self._max_tokens = manifest.max_tokens
        self._widths: dict[str, dict[str, int]] = {}
        self._keys = Tally("a caption has its digest, and one row for each encoder")
        self._made = Tally("embeddings are of the manifest's encoders")
        self._arrays = Tally("embeddings have their shape and dtype")
        self._finite = Tally("embeddings are finite")

    def take(self, row: Row) -> None:
        """Ask everything of a row."""
        self.count += 1
        encoder, digest = row["encoder"], row["caption_digest"]
        name = f"{encoder} {row['caption']!r}"
        self._keys.ask(name, self._key_problem(row))
        wanted = self._encoders.get(encoder)
        self._made.ask(name, differs(row["encoder_digest"], wanted))
        if encoder in self.known:
            self.known[encoder].add(digest)
            self.rounding.add(encoder, [row.get("relative_error")])  # older files have none
        found = _embeddings(row)
        self._arrays.ask(name, self._array_problem(encoder, found))
        arrays = [array for array in found.values() if array is not None]
        self._finite.ask(name, not_finite(arrays))

    def checks(self) -> list[Check]:
        """What came of it, and whether the empty caption is there."""
        empty = Tally("the empty caption is embedded")
        for name, digests in self.known.items():
            empty.ask(name, "" if caption_digest("") in digests else "it is not")
        return [
            each.check() for each in (self._keys, self._made, self._arrays, self._finite, empty)
        ]

    def _key_problem(self, row: Row) -> str:
        digest = row["caption_digest"]
        if row["caption"] is None or caption_digest(row["caption"]) != digest:
            return f"its digest is not {digest}"
        return "there twice" if digest in self.known.get(row["encoder"], ()) else ""

    def _array_problem(self, encoder: str, found: Mapping[str, np.ndarray | None]) -> str:
        if not found:
            return "neither tokens nor a pooled vector"
        widths = {name: array.shape[-1] for name, array in found.items() if array is not None}
        if len(widths) < len(found):
            return f"bytes, shape and dtype of {', '.join(found.keys() - widths)} do not agree"
        tokens = found.get("tokens")
        if tokens is not None and not (tokens.ndim == 2 and len(tokens) <= self._max_tokens):
            return f"tokens of shape {tokens.shape}, cut at {self._max_tokens}"
        usual = self._widths.setdefault(encoder, widths)
        return "" if widths == usual else f"widths {widths}, of the first row {usual}"


def _embeddings(row: Row) -> dict[str, np.ndarray | None]:
    """The arrays a row of `texts` has, (L, D) and (1, P); None for one that cannot be decoded."""
    shapes = {"tokens": row["tokens_shape"], "pooled": [1, row["pooled_size"]]}
    return {
        name: _decoded(row[name], shape, row["dtype"])
        for name, shape in shapes.items()
        if row[name] is not None
    }


def _decoded(data: bytes, shape: Sequence[int] | None, dtype: str) -> np.ndarray | None:
    try:
        return decode_embedding(data, shape, dtype) if shape and min(shape) > 0 else None
    except (TypeError, ValueError):  # bytes, shape and dtype do not agree; a UserError is one
        return None
