"""Captions with weights: from the cells that people write to numbers that sum to one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ldm_core.errors import BadMedia

LONGEST_TEXT = 1 << 20  # bytes of a file that holds captions of one sample
Pair = tuple[str, Any]  # a text and the weight somebody wrote beside it, None where nobody did


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of a sample; the weights of all of them sum to one."""

    text: str
    weight: float


def caption_pairs(cell: Any, weights: Any = None) -> list[Pair]:
    """The (text, weight) pairs of a cell, as they were written.

    Args:
        cell: a text, a list of texts, or a list of {"caption" or "text", "weight"}; None is none.
        weights: one weight for all of them, or a list of as many.

    Raises:
        ValueError: the cell is something else.
    """
    items = cell if isinstance(cell, list) else [cell]
    shares = weights if isinstance(weights, list) else [weights] * len(items)
    if len(shares) != len(items):
        shares = [math.nan] * len(items)  # nobody can say which belongs to which
    pairs = [_pair(item, share) for item, share in zip(items, shares, strict=True)]
    if not all(isinstance(text, str) for text, _ in pairs if text is not None):
        raise ValueError(f"caption is {cell!r}; expected text or a list of texts")
    return [(text, weight) for text, weight in pairs if text is not None]


def weigh(pairs: Iterable[Pair]) -> tuple[Caption, ...]:
    """Captions in order, white space collapsed, their weights summing to one.

    Without any weight all are equal and a repeat counts once. With weights, those of a repeat add
    up, a caption without one has 1, and a caption of weight 0, as the store rounds it, is left out.

    Raises:
        BadMedia: stage "list"; reason "no caption"; "unreadable caption", which holds half of a
            surrogate pair; or "bad weight": negative, not a finite number, all zero, or not as
            many as captions.
    """
    said = [(" ".join(text.split()), weight) for text, weight in pairs]
    said = [(text, weight) for text, weight in said if text]
    if not said:
        raise BadMedia("list", "no caption")
    for text, _ in said:
        _check_unicode(text)
    if all(weight is None for _, weight in said):
        texts = dict.fromkeys(text for text, _ in said)
        return tuple(Caption(text, 1 / len(texts)) for text in texts)
    sums: dict[str, float] = {}
    for text, weight in said:
        sums[text] = sums.get(text, 0.0) + _number(weight)
    total = sum(sums.values())
    if not 0 < total < math.inf:
        raise BadMedia("list", "bad weight", f"the weights sum to {total:g}")
    shares = {text: weight / total for text, weight in sums.items()}
    return tuple(Caption(text, share) for text, share in shares.items() if np.float32(share))


def _pair(item: Any, weight: Any) -> tuple[Any, Any]:
    if not isinstance(item, dict):
        return item, weight
    text = item.get("caption")
    return item.get("text") if text is None else text, item.get("weight", weight)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadMedia("list", "unreadable caption", str(error)) from error


def _number(weight: Any) -> float:
    """A weight as a number; CSV has texts where the others have numbers."""
    if weight is None:
        return 1.0
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise BadMedia("list", "bad weight", f"a weight is {weight!r}; use 0 or more")
    return number
