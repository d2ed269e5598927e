"""What made a row of `texts`: its encoder's digest, and how its embeddings are stored."""

from ldm_core.latents.codec import INT8_DTYPE
from ldm_core.latents.schema import ARRAY_DTYPE

_TOKENS = "-tokens"
_SUFFIXES = (f"-{INT8_DTYPE}", _TOKENS)  # outermost first


def stored_as(digest: str, dtype: str, both: bool = False) -> str:
    """An encoder's digest, with what of the storing is not usual: its rows are other numbers.

    Args:
        digest: of the encoder.
        dtype: of the embeddings.
        both: whether rows with a pooled vector have tokens too.
    """
    kept = f"{digest}{_TOKENS}" if both else digest
    return kept if dtype == ARRAY_DTYPE else f"{kept}-{dtype}"


def made_by(stored: str) -> str:
    """The encoder's own digest: what a generator compares, which stores nothing."""
    for suffix in _SUFFIXES:
        stored = stored.removesuffix(suffix)
    return stored
