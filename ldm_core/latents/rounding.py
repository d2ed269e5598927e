"""What 8-bit storage of embeddings cost them, as measured when each was stored."""

import math
from collections.abc import Iterable

from ldm_core.latents.manifest import RoundingError
from ldm_core.latents.statistics import exact_sum


class RoundingErrors:
    """Relative errors of any number of captions, encoder by encoder; the order does not matter."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._largest: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}

    def add(self, encoder: str, errors: Iterable[float | None]) -> None:
        """Count captions of an encoder; those that were not measured are not counted."""
        known = [error for error in errors if error is not None]
        if known:
            self._count[encoder] = self._count.get(encoder, 0) + len(known)
            self._largest[encoder] = max(self._largest.get(encoder, 0.0), *known)
            self._sums[encoder] = exact_sum([*self._sums.get(encoder, ()), *known])

    def result(self) -> dict[str, RoundingError]:
        """By encoder; none of those that store 16 bits."""
        return {
            encoder: RoundingError(
                captions=self._count[encoder],
                mean=math.fsum(self._sums[encoder]) / self._count[encoder],
                largest=self._largest[encoder],
            )
            for encoder in sorted(self._count)
        }
