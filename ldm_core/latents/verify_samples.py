"""The rules that the rows of `samples` obey, asked of some rows after the others.

What is kept of a row is 16 bytes of digest.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ldm_core.latents.manifest import LatentStatistics, Manifest
from ldm_core.latents.schema import (
    ARRAY_DTYPE,
    caption_digest,
    captions_digest,
    content_digest,
    decode_array,
    sample_digest,
)
from ldm_core.latents.statistics import ChannelMoments, Posterior
from ldm_core.latents.tally import Check, Row, Tally, differs, not_finite

_DIGEST_BYTES = 16
_WEIGHT_TOLERANCE = 1e-3  # the weights are float32


class SampleChecks:
    """The rules of `samples`, of which `texts` are to hold the captions.

    Attributes:
        count: rows seen.
        buckets: number of samples of each.
    """

    def __init__(self, manifest: Manifest, texts: Mapping[str, set[str]]) -> None:
        self.count = 0
        self.buckets: Counter[str] = Counter()
        self._manifest, self._texts = manifest, texts
        self._shapes: dict[str, list[int]] = {}
        self._digests = bytearray()
        self._moments = ChannelMoments()
        self._latents = Tally("latents have their shape and dtype")
        self._finite = Tally("latents are finite")
        self._named = Tally("a row's digest is that of its latents and captions")
        self._made = Tally("latents are of the manifest's autoencoder")
        self._captions = Tally("captions are embedded by every encoder")

    def take(self, rows: Sequence[Row]) -> None:
        """Ask everything of some rows."""
        self.count += len(rows)
        self.buckets.update(row["bucket"] for row in rows)
        posteriors = [self._take(row) for row in rows]
        self._moments.add([each for each in posteriors if each is not None])

    def checks(self) -> list[Check]:
        """What came of it."""
        tallies = (self._latents, self._finite, self._named, self._made, self._captions)
        return [each.check() for each in tallies]

    def content(self) -> str:
        """Digest of the rows seen and the manifest's encoders."""
        data, step = self._digests, _DIGEST_BYTES
        each = (data[start : start + step].hex() for start in range(0, len(data), step))
        encoders = (self._manifest.autoencoder, *self._manifest.texts)
        return content_digest(each, [entry.digest for entry in encoders])

    def statistics(self) -> LatentStatistics | None:
        """Of the usable rows seen; None if there was none."""
        return self._moments.result()

    def _take(self, row: Row) -> Posterior | None:
        id, digest = row["id"], row["encoder_digest"]
        self._made.ask(id, differs(digest, self._manifest.autoencoder.digest))
        self._named.ask(id, self._digest_problem(row))
        self._captions.ask(id, self._caption_problem(row["captions"]))
        shape, dtype = row["latent_shape"], row["latent_dtype"]
        mean, logvar = (
            _array(row[name], shape, dtype) for name in ("latent_mean", "latent_logvar")
        )
        if mean is None or logvar is None:
            self._latents.ask(id, f"its bytes are not {shape} of {dtype}")
            return None
        self._latents.ask(id, self._shape_problem(row["bucket"], shape))
        right_channels = len(mean) == self._manifest.channels
        finite = self._finite.ask(id, not_finite((mean, logvar)))
        return (mean[None], logvar[None]) if finite and right_channels else None

    def _shape_problem(self, bucket: str, shape: list[int]) -> str:
        if shape[0] != self._manifest.channels:
            return f"{shape[0]} channels, the manifest says {self._manifest.channels}"
        usual = self._shapes.setdefault(bucket, shape)
        return "" if shape == usual else f"shape {shape}, the first of {bucket} is {usual}"

    def _digest_problem(self, row: Row) -> str:
        stored = row["digest"] or ""
        try:
            value = bytes.fromhex(stored)
        except ValueError:
            value = b""
        if len(value) != _DIGEST_BYTES:
            return f"its digest is {stored!r}"
        self._digests += value
        captions = row["captions"] or ()
        mean, logvar = row["latent_mean"] or b"", row["latent_logvar"] or b""
        found = sample_digest(row["id"], mean, logvar, captions, row["encoder_digest"])
        if found != stored:
            return f"it is {found}, the row says {stored}"
        return (
            "" if row["captions_digest"] == captions_digest(captions) else "captions_digest is not"
        )

    def _caption_problem(self, captions: Sequence[Row] | None) -> str:
        if not captions:
            return "no captions"
        for each in captions:
            text, digest = each["caption"], each["digest"]
            if text is None or caption_digest(text) != digest:
                return f"{text!r} has not the digest {digest}"
            lacking = [name for name, known in self._texts.items() if digest not in known]
            if lacking:
                return f"{text!r} is not embedded by {', '.join(lacking)}"
        weights = [each["weight"] or 0.0 for each in captions]
        good = min(weights) > 0 and abs(sum(weights) - 1) < _WEIGHT_TOLERANCE
        return "" if good else f"weights {weights}"


def _array(data: bytes | None, shape: Sequence[int] | None, dtype: str) -> np.ndarray | None:
    """The latents of a row, or None where bytes, shape and dtype do not agree."""
    if data is None or not shape or dtype != ARRAY_DTYPE:
        return None
    try:
        return decode_array(data, shape) if min(shape) > 0 else None
    except (TypeError, ValueError):
        return None
