"""File names written with braces: `shard-{000..009}.tar`, `{train,test}.tar`."""

import re

from ldm_core.errors import UserError

MOST_NAMES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """All names that a pattern stands for, in order; itself, if it has no braces.

    Numbers keep the leading zeros of the range's first.

    Raises:
        UserError: a range that ends before it begins, or too many names.
    """
    names = [""]
    position = 0
    for match in _BRACES.finditer(pattern):
        before, choices = pattern[position : match.start()], _choices(pattern, match[1])
        if len(names) * len(choices) > MOST_NAMES:
            raise UserError(f"{pattern} stands for more than {MOST_NAMES} files")
        names = [name + before + choice for name in names for choice in choices]
        position = match.end()
    return [name + pattern[position:] for name in names]


def _choices(pattern: str, inside: str) -> list[str]:
    bounds = _RANGE.fullmatch(inside)
    if not bounds:
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if not 0 <= last - first < MOST_NAMES:
        raise UserError(
            f"{pattern}: {{{inside}}} is no range of 1 to {MOST_NAMES} names; write it as "
            "{first..last}, such as {000..009}"
        )
    return [str(number).zfill(len(bounds[1])) for number in range(first, last + 1)]
