"""What a published version of the latent store says about itself."""

import math

from pydantic import BaseModel, ConfigDict

FORMAT = 3


def close(here: float, there: float) -> bool:
    """Whether two statistics are one and the same, computed on two machines."""
    return math.isclose(here, there, rel_tol=1e-6, abs_tol=1e-9)


class Frozen(BaseModel):
    """Immutable; a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EncoderEntry(Frozen):
    """An encoder that made the rows: its digest decides, its URI says where it was found."""

    name: str
    uri: str
    digest: str


class LatentStatistics(Frozen):
    """Per channel of the raw latents, over samples, positions and the posterior's spread."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def is_close(self, other: "LatentStatistics") -> bool:
        """Whether they are the same but for another machine's exp."""
        if (len(self.mean), len(self.std)) != (len(other.mean), len(other.std)):
            return False
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=True)
        return all(close(here, there) for here, there in pairs)


class RoundingError(Frozen):
    """What 8 bits cost the token embeddings of an encoder: ||x - x^|| / ||x|| of each caption.

    Attributes:
        captions: of which it was measured, when they were stored.
        mean, largest: over these.
    """

    captions: int
    mean: float
    largest: float


class Manifest(Frozen):
    """One version: all tables pinned, and what a reader wants to know before it opens them.

    Attributes:
        number: given by `LatentStore.publish`; 0 before.
        publication: a random token by which a publisher knows its own file again.
        created: UTC, ISO 8601.
        tables: Delta version of each table.
        counts: rows of each table.
        autoencoder: what made the latents.
        texts: what embedded the captions, "t5" and "clip".
        max_tokens: at which captions were cut.
        channels, downsampling: of the autoencoder.
        buckets: number of samples of each bucket "HxWxT".
        rejects: number of rejects by reason.
        bytes: of the tables' files.
        content: digest of ids, latents, captions and encoders, whatever the order of the rows.
        rounding: by encoder, of embeddings in 8 bits; none of those in 16.
        encoding: what of the latents' making was chosen and is not usual, e.g. {"tile": 512}.
    """

    format: int = FORMAT
    number: int = 0
    publication: str = ""
    created: str = ""
    tables: dict[str, int]
    counts: dict[str, int]
    autoencoder: EncoderEntry
    texts: tuple[EncoderEntry, ...]
    max_tokens: int
    channels: int
    downsampling: int
    statistics: LatentStatistics
    buckets: dict[str, int]
    rejects: dict[str, int]
    bytes: int
    content: str
    rounding: dict[str, RoundingError] = {}
    encoding: dict[str, bool | int | str] = {}

    def says_the_same(self, other: "Manifest") -> bool:
        """Whether publishing this one after the other would tell a reader nothing new."""
        unstamped = {"number": 0, "publication": "", "created": "", "statistics": None}
        same = self.model_copy(update=unstamped) == other.model_copy(update=unstamped)
        return same and self.statistics.is_close(other.statistics)
