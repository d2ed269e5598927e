"""Pairs of parameters of which some prove what all do."""

from collections.abc import Mapping
from typing import Any

import pytest


def covering(rows: Mapping[str, Any], columns: Mapping[str, Any]) -> list[Any]:
    """Every pair, all of them slow but a diagonal that has each row and each column.

    Args:
        rows: parameters by name.
        columns: others.

    Returns:
        Values of `pytest.mark.parametrize` for two arguments.
    """
    return [
        pytest.param(
            rows[row],
            columns[column],
            id=f"{row}-{column}",
            marks=[] if i % len(columns) == j % len(rows) else [pytest.mark.slow],
        )
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]
