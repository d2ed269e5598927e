from collections import Counter
from itertools import permutations, product

import pytest
from scipy.stats import binomtest

from ldm_core.errors import UserError
from ldm_core.evaluation.statistics import chance_levels, wilson_interval
from ldm_core.media.shapes import COLORS, SHAPES


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (1, 3), (480, 512), (1, 1)])
def test_wilson_agrees_with_scipy(successes, trials):
    reference = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx(
        (reference.low, reference.high), abs=1e-7
    )


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(UserError, match="need 0 <= successes <= trials"):
        wilson_interval(successes, trials)


def test_chance_of_a_single_object():
    levels = chance_levels("single")
    assert levels["color"] == 1 / 8
    assert levels["shape"] == 1 / 4
    assert levels["position"] == 1 / 5
    assert levels["background"] == 1 / 3
    assert "both" not in levels


def test_chance_of_a_pair_by_listing_all_pairs():
    pairs = list(permutations(product(COLORS, SHAPES), 2))
    for attribute, index in (("color", 0), ("shape", 1)):
        values = Counter(tuple(sorted((a[index], b[index]))) for a, b in pairs)
        chance = sum((n / len(pairs)) ** 2 for n in values.values())
        assert chance_levels("double")[attribute] == pytest.approx(chance)
    assert chance_levels("double")["both"] == pytest.approx(2 / len(pairs))
